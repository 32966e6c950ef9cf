"""Runs one property of this folder by libFuzzer: `python -m tests.fuzz.coverage_guided MODULE.NAME SECONDS SEED`.

libFuzzer changes the bytes from which Hypothesis draws, and keeps those that reach new lines of dvd-serve.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

_MODULES = ("test_embeddings", "test_urls", "test_requests", "test_media")
_PACKAGES = ["common", "server", "vision_worker"]
_FAILURES = Path(__file__).parents[2] / ".hypothesis/libfuzzer"


def properties() -> list[str]:
    """Return the names of the properties that take bytes or values alone, no fixture."""
    return [
        f"{name}.{test}"
        for name in _MODULES
        for test in vars(importlib.import_module(f"tests.fuzz.{name}"))
        if test.startswith("test_")
    ]


def main(name: str, seconds: str, seed: str) -> None:
    """Fuzz one property. Exits with a status other than 0 if it fails."""
    import atheris

    settings.register_profile("guided", deadline=None, suppress_health_check=list(HealthCheck))
    settings.load_profile("guided")
    _FAILURES.mkdir(parents=True, exist_ok=True)
    module, _, test = name.partition(".")
    with atheris.instrument_imports(include=_PACKAGES, enable_loader_override=False):
        function: Any = getattr(importlib.import_module(f"tests.fuzz.{module}"), test)
    flags = [f"-max_total_time={seconds}", f"-seed={seed}", f"-artifact_prefix={_FAILURES}/", "-verbosity=0", "-timeout=60"]
    atheris.Setup([sys.argv[0], *flags], function.hypothesis.fuzz_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])

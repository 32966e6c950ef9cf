"""Settings of all tests: which of them need vLLM or client libraries or are slow, and that none is skipped in CI."""

import os
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import TypeVar

import pytest

_Report = TypeVar("_Report", pytest.TestReport, pytest.CollectReport)

_TESTS = Path(__file__).parent
_VLLM_UNITS = (
    "connector",
    "engine",
    "main",
    "media",
    "prefill_engine",
    "renderer",
    "serving",
    "vllm_arguments",
    "vllm_flags",
    "watchdog",
)
_NEED_VLLM = ("e2e", *(f"lm_worker/test_{name}.py" for name in _VLLM_UNITS))
"""Folders and files whose tests start vLLM or import it, which takes longer than all the rest of a test."""

_SLOW = (
    "benchmarks",
    "common/test_hub.py",
    "common/transport/test_kill.py",
    "demo",
    "deploy/test_health.py",
    "deploy/test_prometheus.py",
    "deploy/test_request_id.py",
    "docs/test_site.py",
    "dvd/test_cli.py",
    "dvd/test_drain.py",
    "fuzz",
    "server/test_main.py",
    "server/test_process_faults.py",
    "server/test_processes.py",
    "test_entry_points.py",
    "test_secrets.py",
    "trouble/test_base_lines.py",
    "vision_worker/models/test_compiled.py",
    "vision_worker/models/test_intern_vit.py",
    "vision_worker/models/test_internvl.py",
    "vision_worker/test_main.py",
)
"""Folders and files whose tests train, compile, import transformers, start several processes or build the site."""

_CLIENTS = tuple(f"e2e/clients/test_{name}.py" for name in ("documentation", "frameworks", "structured_output"))
"""Files of `make test-clients`: they need the environment that `make clients` creates, or a server that writes compact JSON."""
_HAS_CLIENTS = (_TESTS.parent / ".venv-clients/installed").exists()

_NEED_GPU = ("vision_worker/test_gpu.py",)
"""Files whose tests all run on a GPU."""
_HAS_GPU = any(Path("/dev").glob("nvidia[0-9]*"))  # asking torch would make every start of pytest seconds longer

_LONG = (
    "e2e/test_hostile_fields.py",
    "e2e/test_narrow.py",
    "e2e/test_real_shapes.py",
    "lm_worker/test_serving.py",
    "lm_worker/test_watchdog.py",
)
"""Files of `make test-long`, which take a minute or more each."""

_MARKED = {"vllm": _NEED_VLLM, "slow": _SLOW, "clients": _CLIENTS, "long": _LONG}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files whose environment is missing, and those whose tests the marker expression excludes.

    Importing the latter takes as long as many tests.
    """
    if not _HAS_CLIENTS and _is_one_of(collection_path, _CLIENTS):
        return True
    if not _HAS_GPU and _is_one_of(collection_path, _NEED_GPU):
        return True
    for name, paths in _MARKED.items():
        if f"not {name}" in config.option.markexpr and _is_one_of(collection_path, paths):
            return True
    return None


def _is_one_of(path: Path, names: Iterable[str]) -> bool:
    return any(path == _TESTS / name for name in names)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of client libraries, those that need vLLM, the slow and the long ones."""
    for item in items:
        for marker, names in _MARKED.items():
            if any(item.path.is_relative_to(_TESTS / name) for name in names):
                item.add_marker(marker)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skipped test into a failed one in CI."""
    report = yield
    return _fail_if_skipped(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Turn a skipped module into an error in CI."""
    report = yield
    return _fail_if_skipped(report)


def _fail_if_skipped(report: _Report) -> _Report:
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, and CI must run every test: {report.longrepr}"
    return report

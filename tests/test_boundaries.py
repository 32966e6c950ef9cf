"""Which package may import which: the doors between the processes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"server", "vision_worker", "lm_worker", "protos", "common", "dvd", "demo"}
MAY_USE = {
    "server": {"protos", "common"},
    "vision_worker": {"protos", "common"},
    "lm_worker": {"protos", "common"},
    "common": {"protos"},
    "protos": set(),
    "demo": {"vision_worker", "common"},  # and nobody may use it
}
FORBIDDEN = {
    "server": {"torch", "vllm", "transformers", "numpy", "safetensors"},
    "vision_worker": {"fastapi", "vllm", "transformers", "aiohttp", "uvicorn"},
    "lm_worker": {"fastapi", "PIL"},
    "common": {"fastapi", "vllm", "torch", "transformers", "PIL"},
    "protos": set(),
    "demo": {"vllm"},
}


def imported(file: Path) -> set[str]:
    """Top-level names of everything that a file imports, at its head or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", sorted(MAY_USE))
def test_a_package_opens_only_its_own_doors(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        found = imported(file)
        assert not (found & OURS) - MAY_USE[package] - {package}, file
        assert not found & FORBIDDEN[package], file


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("server.app", ["torch", "vllm", "transformers", "numpy", "vision_worker", "lm_worker"]),
        ("dvd.cli", ["torch", "vllm", "fastapi"]),
        ("dvd.health", ["torch", "vllm", "fastapi", "aiohttp", "numpy"]),
        ("lm_worker.sink", ["torch", "vllm", "transformers"]),
        ("lm_worker.plugin", ["torch", "vllm"]),
        ("common.rpc", ["torch", "vllm", "fastapi"]),
        ("common.tiling", ["torch", "numpy", "PIL"]),
    ],
)
def test_heavy_imports_stay_behind_the_name_that_needs_them(module: str, absent: list[str]) -> None:
    script = f"import sys, {module}; print(*(name for name in {absent!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_no_package_hides_under_tests() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py")), "tests/server would shadow server"

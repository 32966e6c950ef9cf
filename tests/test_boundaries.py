"""Which package may import which, so that each process can be shipped without the others' code."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROCESSES = {"server", "vision_worker", "lm_worker"}
PACKAGES = {*PROCESSES, "protos", "common", "dvd", "demo", "benchmarks", "tests"}

MAY_IMPORT = {
    "protos": set(),
    "common": {"protos"},
    "server": {"protos", "common"},
    "vision_worker": {"protos", "common"},
    "lm_worker": {"protos", "common"},
    "dvd": {"protos", "common"},  # and options of the processes: see below
    "demo": {"vision_worker", "common"},
    "benchmarks": {"vision_worker", "lm_worker", "protos", "common", "dvd", "demo", "tests"},
}
FORBIDDEN_LIBRARIES = {
    "protos": set(),
    "common": {"fastapi", "vllm", "torch", "transformers", "PIL"},
    "server": {"torch", "vllm", "transformers", "numpy", "safetensors"},
    "vision_worker": {"fastapi", "vllm", "transformers", "aiohttp", "uvicorn"},
    "lm_worker": {"fastapi", "PIL"},
    "dvd": {"fastapi", "uvicorn", "aiohttp", "vllm", "torch", "transformers", "numpy"},
    "demo": {"vllm"},
    "benchmarks": set(),
}


def imported_modules(file: Path) -> set[str]:
    """Dotted names of everything that a file imports, at its head or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def top_level(modules: set[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


def may_read_options_of_processes(file: Path) -> bool:
    """`dvd up` starts the processes and so needs their options; all other commands run in images without them."""
    return file.parent == ROOT / "dvd" and file.name.startswith("up")


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_a_package_imports_only_what_it_may(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        modules = imported_modules(file)
        if may_read_options_of_processes(file):
            modules = {module for module in modules if module.split(".")[:2] not in [[name, "config"] for name in PROCESSES]}
        assert not (top_level(modules) & PACKAGES) - MAY_IMPORT[package] - {package}, file
        assert not top_level(modules) & FORBIDDEN_LIBRARIES[package], file


def test_only_the_command_line_imports_the_supervisor_of_all_processes() -> None:
    """Any other file of `dvd` that did would need the packages of all processes."""
    modules = {file.name: imported_modules(file) for file in (ROOT / "dvd").rglob("*.py")}
    importers = {name for name, imports in modules.items() if any(module.startswith("dvd.up") for module in imports)}
    assert importers == {"cli.py", "up.py", "up_processes.py", "supervisor.py", "announcement.py"}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("server.app", ["torch", "vllm", "transformers", "numpy", "av", "PIL", "vision_worker", "lm_worker", "dvd"]),
        ("dvd.cli", ["torch", "vllm", "fastapi", "server", "vision_worker", "lm_worker"]),
        ("dvd.health", ["torch", "vllm", "fastapi", "aiohttp", "numpy", "server", "vision_worker", "lm_worker"]),
        ("dvd.up", ["torch", "vllm", "fastapi", "aiohttp", "numpy", "uvicorn"]),
        ("lm_worker.sink", ["torch", "vllm", "transformers"]),
        ("lm_worker.plugin", ["torch", "vllm"]),
        ("common.rpc", ["torch", "vllm", "fastapi"]),
        ("common.tiling", ["torch", "numpy", "PIL"]),
    ],
)
def test_heavy_libraries_are_imported_only_where_needed(module: str, absent: list[str]) -> None:
    script = f"import sys, {module}; print(*(name for name in {absent!r} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_tests_are_no_packages() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py")), "tests/server would shadow server"

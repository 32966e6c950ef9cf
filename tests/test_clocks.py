"""The wall clock may jump, so that it decides nothing: waits, deadlines and leases are measured by the monotonic clock."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WALL_CLOCK = {"time.time", "time.time_ns", "time.localtime", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}
ALLOWED = {"common/grants.py", "common/logs.py", "dvd/plan/probe.py"}
"""A grant expires at a time that two machines must agree on, and tolerates clocks that differ; the time of a log line is for
people; `dvd plan` only needs a number that no earlier run has used."""


def wall_clock_calls(source: str) -> set[str]:
    """Return what a module uses of the wall clock, under the names with which it is usually imported."""
    tree = ast.parse(source)
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    imported = {
        f"{node.module}.{alias.name}" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    return {name for name in WALL_CLOCK if name in imported or any(use == name or use.endswith(f".{name}") for use in used)}


@pytest.mark.parametrize("package", ["server", "vision_worker", "lm_worker", "common", "dvd"])
def test_no_process_depends_on_the_wall_clock(package: str) -> None:
    files = [file for file in (ROOT / package).rglob("*.py") if str(file.relative_to(ROOT)) not in ALLOWED]
    assert files
    assert {file.name: calls for file in files if (calls := wall_clock_calls(file.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    "source", ["import time\nx = time.time()", "from time import time", "import datetime\ndatetime.datetime.now()"]
)
def test_a_use_of_the_wall_clock_is_seen(source: str) -> None:
    assert wall_clock_calls(source)

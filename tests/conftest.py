"""Settings of all tests: which of them need vLLM or are slow, and that none is skipped in CI."""

import os
from collections.abc import Generator
from pathlib import Path
from typing import TypeVar

import pytest

_Report = TypeVar("_Report", pytest.TestReport, pytest.CollectReport)

_TESTS = Path(__file__).parent
_NEED_VLLM = ("e2e", "lm_worker/test_connector.py", "lm_worker/test_media.py")
"""Folders and files whose tests start vLLM or import it, which takes longer than all the rest of a test."""

_SLOW = (
    "deploy/test_health.py",
    "deploy/test_prometheus.py",
    "deploy/test_request_id.py",
    "docs/test_site.py",
    "vision_worker/models/test_compiled.py",
)
"""Files whose tests start several processes, wait for scrapes, compile a model or build the site: half a minute each."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need vLLM, and the slow ones."""
    for item in items:
        for marker, names in ((pytest.mark.vllm, _NEED_VLLM), (pytest.mark.slow, _SLOW)):
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

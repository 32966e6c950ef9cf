"""Fixtures: a gateway with one fake worker of each kind."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from server.workers import probes
from tests.server.fakes.stack import Stack, start_stack


@pytest.fixture(autouse=True)
def _frequent_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tests wait until a probe finds what they have changed."""
    monkeypatch.setattr(probes, "POLL_INTERVAL_SECONDS", 0.1)


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    """A gateway of its own for each test; it may fetch from private addresses."""
    async with start_stack(tmp_path, allow_private_images=True) as running:
        yield running


@pytest.fixture(scope="module")
async def shared_stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """A gateway with low limits, started once a module, for tests that leave no state behind."""
    folder = tmp_path_factory.mktemp("shared")
    limits: dict[str, Any] = {
        "max_body_bytes": 1 << 20,
        "max_image_bytes": 100_000,
        "max_image_pixels": 10_000,
        "max_images": 4,
    }
    async with start_stack(folder, **limits) as running:
        yield running

"""Fixtures: a gateway whose vision worker decodes images."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.server.fakes.stack import Stack
from tests.trouble.media_stack import RecordingEncoder, start_media_stack


@pytest.fixture
async def media_stack(tmp_path: Path) -> AsyncIterator[tuple[Stack, RecordingEncoder]]:
    """A gateway of its own for each test, and the encoder of its vision worker."""
    async with start_media_stack(tmp_path, allow_private_images=True) as running:
        yield running

"""Sends embeddings to a sink until it is ended: `python -m benchmarks.embedding_sender ADDRESS FINGERPRINT WIDTH FILE`."""

import asyncio
import contextlib
import itertools
import json
import os
import sys
import time
from pathlib import Path

from common.embedding import Header
from vision_worker.delivery import SinkChannels

_BYTES_PER_SECOND = 1e9
_EMBEDDING_BYTES = 2 << 20
_MAX_BACKLOG_SECONDS = 0.1
_DELIVERY_TIMEOUT_SECONDS = 60


async def _send(address: str, fingerprint: str, width: int, sent_file: Path) -> None:
    """Deliver one embedding after another, at most `_BYTES_PER_SECOND`, and append `[time, bytes]` of each to a file."""
    rows = _EMBEDDING_BYTES // (2 * width)
    data = memoryview(bytes(2 * width * rows))
    due = time.monotonic()
    async with SinkChannels() as sinks:
        for number in itertools.count():
            header = Header(f"arrival-{os.getpid()}-{number}", fingerprint, "bfloat16", rows, width)
            await sinks.deliver(address, header, data, _DELIVERY_TIMEOUT_SECONDS)
            with sent_file.open("a") as file:
                file.write(f"{json.dumps([time.monotonic(), len(data)])}\n")
            due = max(due + len(data) / _BYTES_PER_SECOND, time.monotonic() - _MAX_BACKLOG_SECONDS)
            await asyncio.sleep(max(0.0, due - time.monotonic()))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_send(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])))

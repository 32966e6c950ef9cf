"""Embeddings without end into one sink: `python -m benchmarks.sender ADDRESS FINGERPRINT WIDTH FILE`, until it is ended."""

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

RATE = 1e9
"""Bytes a second."""
SIZE = 2 << 20


async def _send(address: str, fingerprint: str, width: int, sent: Path) -> None:
    """Deliver one after another, no faster than `RATE`, and write down when and how many bytes."""
    rows = SIZE // (2 * width)
    data, sinks = memoryview(bytes(2 * width * rows)), SinkChannels()
    due = time.monotonic()
    for number in itertools.count():
        await sinks.deliver(address, Header(f"arrival-{os.getpid()}-{number}", fingerprint, "bfloat16", rows, width), data, 60)
        with sent.open("a") as file:
            file.write(f"{json.dumps([time.monotonic(), len(data)])}\n")
        due = max(due + len(data) / RATE, time.monotonic() - 0.1)
        await asyncio.sleep(max(0.0, due - time.monotonic()))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_send(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])))

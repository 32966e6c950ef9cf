"""Transport between processes that share files: the offer is the path of the slot's file, and the sender writes into it."""

import asyncio
import contextlib
import io
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from common.embedding import HEADER_SIZE, Header, write_all
from common.transport.base import OnProgress, Slot

NAME = "shm"
_INLINE_BYTES = 2 << 20
"""Largest embedding that is written by the event loop itself: a thread would take nearly as long to wake up."""
_PROGRESS_BYTES = 2 << 20
"""Bytes between two reports of progress. The sink checks them while they are in the processors' shared cache."""


class SharedMemoryTransport:
    """Implements `Transport`."""

    name: ClassVar[str] = NAME

    def __init__(self) -> None:
        self._writing = asyncio.Lock()

    async def place(self, offer: str, header: Header, data: memoryview, on_progress: OnProgress | None = None) -> bool:
        """Write the values into the file, which must begin with `header`.

        One file after another: the sink checks the first while the second is being written. Otherwise several would be complete
        at the same time, and then be checked at the same time.
        """
        if len(data) <= _INLINE_BYTES:
            return write_to_file(offer, header, data)
        async with self._writing:
            return await asyncio.to_thread(write_to_file, offer, header, data, on_progress)

    async def close(self) -> None:
        """Do nothing: no file stays open."""


def write_to_file(path: str, header: Header, data: memoryview, on_progress: OnProgress | None = None) -> bool:
    """Write values into the file of a sink. Returns whether they were written.

    The path comes from the network: the header in the file proves that a sink created it for this embedding. The file is
    open only meanwhile: a sink does not reuse the file of an evicted embedding while a process has it open.
    """
    try:
        # O_NONBLOCK: a path that names a device or a pipe must not block the sender
        with open(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY), "r+b", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode) or file.read(HEADER_SIZE) != header.pack():
                return False
            _write_in_parts(file, data, on_progress)
    except OSError:  # no such file here, no permission, or no room: send the values, and the sink reports its own error
        return False
    return True


def _write_in_parts(file: io.FileIO, data: memoryview, on_progress: OnProgress | None) -> None:
    part_bytes = _PROGRESS_BYTES if on_progress else max(1, len(data))
    for start in range(0, len(data), part_bytes):
        end = start + part_bytes
        write_all(file, data[start:end])
        if on_progress is not None and end < len(data):
            on_progress(NAME, end)


@dataclass
class _PathOffer:
    """The path of a slot's file. Implements `Offer`."""

    text: str

    async def received(self) -> None:
        """Return at once: what the sender has written is in the file."""


class SharedMemoryReceiver:
    """Implements `Receiver`."""

    name: ClassVar[str] = NAME

    @contextlib.contextmanager
    def offer(self, slot: Slot, on_progress: Callable[[], None]) -> Iterator[_PathOffer]:
        """Offer the slot's file."""
        yield _PathOffer(str(slot.path))

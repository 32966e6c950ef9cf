"""A file of shared memory that holds one embedding after another, open and mapped for as long as it exists."""

import contextlib
import fcntl
import mmap
import os
import signal
import weakref
from pathlib import Path

from lm_worker.huge_pages import allocate_huge_pages

_MADV_POPULATE_WRITE = 23  # not in Python's `mmap`

DESCRIPTORS = 2
"""Descriptors of a file: its own, and one of its mapping."""


class SlotFile:
    """Owns descriptor and mapping of a file.

    Mapping a file costs as much as checking its values: the kernel enters each page into the page table, and removes it again.
    So both stay while embeddings come and go. They belong to one open file, and so do not count as another user of it in
    `is_unshared`.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, which is created if there is none. Raises: `OSError`."""
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._close = weakref.finalize(self, os.close, self._descriptor)  # a store that is dropped closes its files
        self._close.atexit = False
        self._mapping: mmap.mmap | None = None

    def close(self) -> None:
        """Close the file. The mapping goes with the last view of it, which a task that was cancelled may still have."""
        self._close()
        self._mapping = None

    @property
    def size(self) -> int:
        """Bytes of the file. Raises: `OSError`."""
        return os.fstat(self._descriptor).st_size

    def resize(self, size: int) -> None:
        """Cut or extend the file, which gets all of its pages: otherwise a write into a mapping would be what fails.

        No view of the mapping may exist. Raises: `OSError`.
        """
        previous = self.size
        if previous == size:
            return
        if self._mapping is not None and size:
            self._mapping.resize(size)  # the file, too
        else:
            self._mapping = None
            os.ftruncate(self._descriptor, size)
        if previous < size:
            if not previous:
                allocate_huge_pages(self._descriptor)
            os.posix_fallocate(self._descriptor, previous, size - previous)
            self._populate(previous)

    def _populate(self, start: int) -> None:
        if self._mapping is not None:
            start -= start % mmap.PAGESIZE
            with contextlib.suppress(OSError):  # an older kernel: each page is then entered when it is used
                self._mapping.madvise(_MADV_POPULATE_WRITE, start, len(self._mapping) - start)

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write all of `data` at an offset. Raises: `OSError`."""
        with memoryview(data) as rest:
            written = 0
            while written < len(rest):
                written += os.pwrite(self._descriptor, rest[written:], offset + written)

    def map(self) -> memoryview:
        """View of the whole file. Release it before the file is resized. Raises: `OSError`."""
        if self._mapping is None:
            # all pages at once: a page fault for each would cost more than the values
            self._mapping = mmap.mmap(self._descriptor, 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        return memoryview(self._mapping)

    def is_unshared(self) -> bool:
        """Whether the file has one name at most, and nobody else has it open or maps it. False if the system cannot tell.

        The kernel grants a write lease only on such a file. Mappings, which outlive their descriptors, count as open files.
        """
        try:
            if os.fstat(self._descriptor).st_nlink > 1:
                return False
            # Whoever opens the file now waits, and this process gets a signal, which by default would end it: SIGURG does not
            fcntl.fcntl(self._descriptor, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(self._descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(self._descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError:
            return False
        return True

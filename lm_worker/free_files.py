"""Files of evicted embeddings, which the next embeddings overwrite: their pages need not be allocated again."""

import fcntl
import itertools
import os
import signal
from pathlib import Path

from lm_worker.shared_memory import FREE

_MAX_TIMES_LARGER = 2
"""A free file is reused for an embedding of at least this part of its size: the rest of its pages is lost."""


class FreeFiles:
    """Owns the files in `.free/`. Not thread-safe.

    A file is reused only if nobody else can reach it: a reader that maps it would see the values of another embedding, and a
    sender that is late would write into one.

    Attributes:
        bytes: Bytes of all free files.
    """

    def __init__(self, folder: Path) -> None:
        """`folder` is that of the store."""
        self._folder = folder / FREE
        self._sizes: dict[Path, int] = {}  # the file freed first is the first
        self._names = map(str, itertools.count())
        self.bytes = 0

    def add(self, path: Path, size: int) -> None:
        """Take the file of an embedding away. It is removed instead of reused if another process still has it open."""
        free = self._folder / next(self._names)
        try:
            path.rename(free)  # before it is examined: from here on nobody can open it by its name
        except FileNotFoundError:  # removed by hand
            return
        if is_unshared(free):
            self._sizes[free] = size
            self.bytes += size
        else:
            free.unlink(missing_ok=True)

    def take(self, path: Path, size: int) -> bool:
        """Move the file that fits `size` bytes best to `path`. Returns False if none fits; the file's size is not changed."""
        fitting = [free for free, its_size in self._sizes.items() if its_size <= _MAX_TIMES_LARGER * size]
        if not fitting:
            return False
        best = min(fitting, key=lambda free: abs(self._sizes[free] - size))
        self.bytes -= self._sizes.pop(best)
        try:
            best.rename(path)
        except FileNotFoundError:  # removed by hand
            return self.take(path, size)
        return True

    def trim(self, limit: int) -> None:
        """Return memory until the free files have at most `limit` bytes."""
        while self.bytes > limit:
            path, size = next(iter(self._sizes.items()))
            keep = max(0, size - (self.bytes - limit))
            if keep < size // _MAX_TIMES_LARGER or not path.exists():
                path.unlink(missing_ok=True)
                del self._sizes[path]
                self.bytes -= size
            else:
                os.truncate(path, keep)
                self._sizes[path] = keep
                self.bytes -= size - keep


def is_unshared(path: Path) -> bool:
    """Whether a file has no other name, and no process has it open or maps it. False if the file system cannot tell.

    The kernel grants a write lease only on such a file, and counts mappings, which outlive their descriptors, as open files.
    """
    try:
        with path.open("r+b", buffering=0) as file:
            descriptor = file.fileno()
            if os.fstat(descriptor).st_nlink > 1:
                return False
            # Whoever opens the file now waits, and this process gets a signal, which by default would end it: SIGURG does not
            fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            return True
    except OSError:  # also if no descriptor is left to open it with
        return False

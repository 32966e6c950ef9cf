"""Files of evicted embeddings, which the next embeddings overwrite: their pages need not be allocated again."""

import itertools
import os
from dataclasses import dataclass
from pathlib import Path

from lm_worker.shared_memory import FREE
from lm_worker.slot_file import SlotFile

_MAX_TIMES_LARGER = 2
"""A free file is reused for an embedding of at least this part of its size: the rest of its pages is lost."""


@dataclass
class _FreeFile:
    file: SlotFile
    size: int


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
        self._files: dict[Path, _FreeFile] = {}  # the file freed first is the first
        self._names = map(str, itertools.count())
        self.bytes = 0

    def add(self, path: Path | str, size: int, file: SlotFile | None = None) -> None:
        """Take the file of an embedding away. It is removed instead of reused if another process still has it open.

        Args:
            path: The file.
            size: Its bytes.
            file: The open file, which belongs to this object from now on; None if it is not open.
        """
        free = self._folder / next(self._names)
        try:
            os.rename(path, free)  # before it is examined: from here on nobody can open it by its name
            file = file or SlotFile(free)
        except FileNotFoundError:  # removed by hand
            _close(file)
        except OSError:  # no descriptor is left
            free.unlink(missing_ok=True)
        else:
            self._add_if_unshared(free, size, file)

    def _add_if_unshared(self, path: Path, size: int, file: SlotFile) -> None:
        if file.is_unshared():
            self._files[path] = _FreeFile(file, size)
            self.bytes += size
        else:
            path.unlink(missing_ok=True)
            file.close()

    def take(self, path: Path, size: int) -> SlotFile | None:
        """Move the file that fits `size` bytes best to `path`. None if none fits; the file's size is not changed."""
        fitting = [free for free, file in self._files.items() if file.size <= _MAX_TIMES_LARGER * size]
        if not fitting:
            return None
        best = min(fitting, key=lambda free: abs(self._files[free].size - size))
        taken = self._files.pop(best)
        self.bytes -= taken.size
        try:
            os.rename(best, path)
        except FileNotFoundError:  # removed by hand
            taken.file.close()
            return self.take(path, size)
        return taken.file

    def trim(self, limit: int) -> None:
        """Return memory until the free files have at most `limit` bytes."""
        while self.bytes > limit:
            path, free = next(iter(self._files.items()))
            keep = max(0, free.size - (self.bytes - limit))
            if keep < free.size // _MAX_TIMES_LARGER or not path.exists():
                path.unlink(missing_ok=True)
                free.file.close()
                del self._files[path]
                self.bytes -= free.size
            else:
                free.file.resize(keep)
                self.bytes -= free.size - keep
                free.size = keep


def _close(file: SlotFile | None) -> None:
    if file is not None:
        file.close()

"""Embeddings in shared memory: one file a key, written by the sink, mapped by vLLM's processes.

A file appears under its key by `rename`, hence complete or not at all. Whoever is about to use one holds it by a hard link
in `held/`: it cannot vanish under the reader, and its link count tells the sink that it must not be evicted.
"""

import contextlib
import mmap
import os
import re
import shutil
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wire import errors, tensors
from wire.tensors import Header

_KEY = re.compile(r"[0-9a-zA-Z_-]{1,128}")


def checked_key(key: str) -> str:
    """`key`, if it may name a file. Raises `InvalidRequest`."""
    if not _KEY.fullmatch(key):
        raise errors.InvalidRequest(f"{key[:140]!r} is no key of an embedding: letters, digits, '-' and '_', at most 128")
    return key


def read_header(path: Path) -> Header:
    """The header of an embedding's file. Raises `FileNotFoundError`, `InvalidRequest`."""
    with path.open("rb") as file:
        return tensors.unpack(file.read(tensors.HEADER_SIZE))


def map_payload(path: Path) -> tuple[Header, mmap.mmap]:
    """Header and the whole file mapped copy-on-write; the values begin at `HEADER_SIZE`. The mapping outlives the file."""
    with path.open("rb") as file:
        # ACCESS_COPY: torch warns about read-only buffers; nobody writes, so no page is ever copied
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return tensors.unpack(memoryview(mapped)[: tensors.HEADER_SIZE]), mapped


class Holder:
    """Holds embeddings for one reader. Single-threaded."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._counts: dict[str, int] = {}

    def held(self, key: str) -> bool:
        return key in self._counts

    def path(self, key: str) -> Path:
        """Of a held embedding."""
        return self._folder / "held" / key

    def hold(self, key: str) -> bool:
        """Take hold of `key` once more; False where it is not there."""
        if key not in self._counts:
            try:
                os.link(self._folder / checked_key(key), self.path(key))
            except FileNotFoundError:
                return False
        self._counts[key] = self._counts.get(key, 0) + 1
        return True

    def release(self, key: str) -> None:
        """Undo one `hold`."""
        self._counts[key] -= 1
        if self._counts[key] == 0:
            del self._counts[key]
            self.path(key).unlink(missing_ok=True)


@dataclass
class _Entry:
    rows: int
    size: int
    leased_until: float


class Store:
    """The sink's view: owns the folder and its budget. All methods run in one thread; sizes in bytes, times in seconds.

    Evicts the least recently used first, and never what was announced, asked for or delivered within `lease` seconds nor
    what a reader holds.
    """

    def __init__(self, folder: Path, budget: int, lease: float) -> None:
        self.folder = folder
        self.budget = budget
        self.used = 0
        self.evictions = 0
        self._lease = lease
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._writes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def rows(self, key: str) -> int:
        """Visual tokens under `key`, 0 when it is not here. Counts as use and renews the lease."""
        entry = self._entries.get(key)
        if entry is None:
            return 0
        entry.leased_until = time.monotonic() + self._lease
        self._entries.move_to_end(key)
        return entry.rows

    @contextlib.contextmanager
    def writing(self, header: Header) -> Iterator[memoryview]:
        """Memory for the values of one embedding, visible under its key when the block ends without an error.

        Raises `SinkFull` where the budget cannot be met without evicting what is in use.
        """
        size = tensors.HEADER_SIZE + header.length
        self._make_room(size)
        self.used += size
        self._writes += 1
        temporary = self.folder / "incoming" / str(self._writes)
        try:
            with _mapped_file(temporary, header) as values:
                yield values
            self._publish(header, temporary, size)
        except BaseException:
            self.used -= size
            temporary.unlink(missing_ok=True)
            raise

    def _publish(self, header: Header, temporary: Path, size: int) -> None:
        if header.key in self._entries:  # delivered twice at once: equal values, keep the older file
            raise errors.InvalidRequest(f"embedding {header.key} was delivered twice at once")
        temporary.rename(self.folder / header.key)
        self._entries[header.key] = _Entry(header.rows, size, time.monotonic() + self._lease)

    def _make_room(self, size: int) -> None:
        if size > self.budget:
            raise errors.SinkFull(f"an embedding of {size} bytes can never fit the sink's {self.budget}: raise --sink-bytes")
        now = time.monotonic()
        for key in list(self._entries):
            if self.used + size <= self.budget:
                return
            if self._entries[key].leased_until < now and not self._is_held(key):
                self._evict(key)
        if self.used + size > self.budget:
            raise errors.SinkFull(f"the sink is full: {self.used} of {self.budget} bytes in use; try again", retry_after=1)

    def _is_held(self, key: str) -> bool:
        return (self.folder / key).stat().st_nlink > 1

    def _evict(self, key: str) -> None:
        (self.folder / key).unlink(missing_ok=True)
        self.used -= self._entries.pop(key).size
        self.evictions += 1


@contextlib.contextmanager
def _mapped_file(path: Path, header: Header) -> Iterator[memoryview]:
    """A new file of the right size with its header written; yields the memory of its values."""
    with path.open("w+b") as file:
        # allocate now: a full /dev/shm must be an error here, not a SIGBUS at the first write
        os.posix_fallocate(file.fileno(), 0, tensors.HEADER_SIZE + header.length)
        with mmap.mmap(file.fileno(), 0) as mapped, memoryview(mapped) as whole:
            whole[: tensors.HEADER_SIZE] = header.pack()
            with whole[tensors.HEADER_SIZE :] as values:
                yield values


def create_folder(folder: Path) -> None:
    """Make the folder anew: what a killed predecessor left behind is gone."""
    shutil.rmtree(folder, ignore_errors=True)
    for part in (folder, folder / "held", folder / "incoming"):
        part.mkdir(mode=0o700)


def default_budget(folder: Path) -> int:
    """A quarter of what the file system has free, at most 8 GiB."""
    free = os.statvfs(folder)
    return min(8 << 30, free.f_bavail * free.f_frsize // 4)


def remove_folder(folder: Path) -> None:
    """Give the memory back."""
    shutil.rmtree(folder, ignore_errors=True)

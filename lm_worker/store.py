"""Embeddings in shared memory: one file a key, written by the sink, mapped by vLLM's processes.

A file appears under its key by `rename`, hence complete or not at all. Whoever is about to use one holds it by a hard link
in `held/`: it cannot vanish under the reader, and its link count tells the sink that it must not be evicted.
"""

import contextlib
import errno
import mmap
import os
import re
import secrets
import shutil
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common import embedding, errors
from common.embedding import Header

_KEY = re.compile(r"[0-9a-zA-Z_-]{1,128}")


def checked_key(key: str) -> str:
    """`key`, if it may name a file. Raises `InvalidRequest`."""
    if not _KEY.fullmatch(key):
        raise errors.InvalidRequest(f"{key[:140]!r} is no key of an embedding: letters, digits, '-' and '_', at most 128")
    return key


def read_header(path: Path) -> Header:
    """The header of an embedding's file. Raises `FileNotFoundError`, `InvalidRequest`."""
    with path.open("rb") as file:
        return embedding.parse_header(file.read(embedding.HEADER_SIZE))


def map_embedding(path: Path) -> tuple[Header, mmap.mmap]:
    """Header and the whole file mapped copy-on-write; the values begin at `HEADER_SIZE`. The mapping outlives the file."""
    with path.open("rb") as file:
        # ACCESS_COPY: torch warns about read-only buffers; nobody writes, so no page is ever copied
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return embedding.parse_header(memoryview(mapped)[: embedding.HEADER_SIZE]), mapped


class Holder:
    """Holds embeddings for one reader, by names of its own: vLLM's data parallelism has several. Single-threaded."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._name = secrets.token_hex(4)
        self._counts: dict[str, int] = {}

    def held(self, key: str) -> bool:
        return key in self._counts

    def path(self, key: str) -> Path:
        """Of a held embedding."""
        return self._folder / "held" / f"{self._name}-{key}"

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
    """`asked`: how often it was asked for, by whoever had it delivered or after that; `changed`: the file's change time when
    it was last asked for, which a reader's hold and release move on."""

    rows: int
    size: int
    leased_until: float
    asked: int
    changed: int


@dataclass
class _Wish:
    """A key that was asked for and is not here yet."""

    asked: int
    leased_until: float


class Store:
    """The sink's view: owns the folder and its budget. All methods run in one thread; sizes in bytes, times in seconds.

    Evicts the least recently used first, and never what a reader holds, nor what was asked for or delivered within `lease`
    seconds. What was asked for once, and was held and let go of since, has served: its lease is over.
    """

    def __init__(self, folder: Path, budget: int, lease: float) -> None:
        self.folder = folder
        self.budget = budget
        self.used = 0
        self.evictions = 0
        self._lease = lease
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._wishes: OrderedDict[str, _Wish] = OrderedDict()
        self._writes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def rows(self, key: str) -> int:
        """Visual tokens under `key`, 0 when it is not here. Counts as use and renews the lease."""
        until = time.monotonic() + self._lease
        entry = self._entries.get(key)
        if entry is None:
            self._wish(key, until)
            return 0
        file = self._status(key)
        entry.asked = 1 if self._may_go(entry, file) else entry.asked + 1
        entry.changed, entry.leased_until = file.st_ctime_ns, until
        self._entries.move_to_end(key)
        return entry.rows

    def _wish(self, key: str, until: float) -> None:
        now = time.monotonic()
        while self._wishes and next(iter(self._wishes.values())).leased_until < now:
            self._wishes.popitem(last=False)
        before = self._wishes.pop(key, None)
        self._wishes[key] = _Wish(before.asked + 1 if before else 1, until)

    @contextlib.contextmanager
    def writing(self, header: Header) -> Iterator["Incoming"]:
        """Takes the values of one embedding, visible under its key when the block ends without an error.

        Raises `SinkFull` where the budget cannot be met without evicting what is in use or the file system is full, and
        `InvalidRequest` where values are missing at the end.
        """
        size = embedding.HEADER_SIZE + header.length
        self._make_room(size)
        self.used += size
        self._writes += 1
        temporary = self.folder / "incoming" / str(self._writes)
        try:
            with contextlib.closing(Incoming(temporary, header)) as incoming:
                yield incoming
                incoming.end()
            self._publish(header, temporary, size)
        except BaseException as error:
            self.used -= size
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise errors.SinkFull("the sink's file system is full: give it more memory, or lower --sink-bytes") from None
            raise

    def _publish(self, header: Header, temporary: Path, size: int) -> None:
        if header.key in self._entries:  # delivered twice at once: equal values, keep the older file
            raise errors.InvalidRequest(f"embedding {header.key} was delivered twice at once")
        temporary.rename(self.folder / header.key)
        wish = self._wishes.pop(header.key, None)
        self._entries[header.key] = _Entry(
            header.rows, size, time.monotonic() + self._lease, wish.asked if wish else 1, self._status(header.key).st_ctime_ns
        )

    def _make_room(self, size: int) -> None:
        if size > self.budget:
            raise errors.SinkFull(f"an embedding of {size} bytes can never fit the sink's {self.budget}: raise --sink-bytes")
        for key, entry in list(self._entries.items()):
            if self.used + size <= self.budget:
                return
            if self._may_go(entry, self._status(key)):
                self._evict(key)
        if self.used + size > self.budget:
            raise errors.SinkFull(f"the sink is full: {self.used} of {self.budget} bytes in use; try again", retry_after=1)

    def _may_go(self, entry: _Entry, file: os.stat_result) -> bool:
        served = entry.asked == 1 and file.st_ctime_ns != entry.changed
        return file.st_nlink == 1 and (served or entry.leased_until < time.monotonic())

    def _status(self, key: str) -> os.stat_result:
        return (self.folder / key).stat()

    def _evict(self, key: str) -> None:
        (self.folder / key).unlink(missing_ok=True)
        self.used -= self._entries.pop(key).size
        self.evictions += 1


class Incoming:
    """The file of an embedding that is arriving: its header, then what `add` is given, or what the sender itself writes.

    Written, not mapped: a new page that is written whole need not be zeroed nor faulted in first, which halves the cost.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self.given = 0  # bytes
        self._header = header
        self._file = path.open("w+b", buffering=0)
        self._whole = False
        embedding.write_all(self._file, memoryview(header.pack()))

    def close(self) -> None:
        self._file.close()

    def add(self, values: bytes | memoryview) -> None:
        """The next values. Raises `InvalidRequest` where they are too many, not whole, or not finite."""
        length, size = self._header.length, embedding.DTYPE_SIZES[self._header.dtype]
        if len(values) % size:
            raise errors.InvalidRequest(f"a part of {len(values)} bytes, expected whole values of {size}")
        if self.given + len(values) > length:
            raise errors.InvalidRequest(f"more than the {length} bytes that the header promised")
        embedding.check_finite(values, self._header.dtype)
        embedding.write_all(self._file, memoryview(values))
        self.given += len(values)

    def end(self) -> None:
        """Raises `InvalidRequest` where values are missing, or where the sender wrote what `add` would not have taken."""
        if self._whole:
            return
        there = os.fstat(self._file.fileno()).st_size - embedding.HEADER_SIZE
        if there != self._header.length or self.given not in (0, there):
            raise errors.InvalidRequest(
                f"{self.given or there} bytes arrived of {self._header.length} that the header promised"
            )
        if not self.given:
            self._check()
        self._whole = True

    def _check(self) -> None:
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE  # all pages at once: a fault for each would cost more than the check
        with mmap.mmap(self._file.fileno(), 0, flags=flags, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as whole:
            if whole[: embedding.HEADER_SIZE] != self._header.pack():
                raise errors.InvalidRequest("the header of the embedding was written over")
            with whole[embedding.HEADER_SIZE :] as values:
                embedding.check_finite(values, self._header.dtype)


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

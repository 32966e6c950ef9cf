"""Layout of the shared memory in which the sink stores embeddings and from which vLLM's processes map them.

One folder per language worker:

    KEY                 one complete embedding: header, then rows × width values (`common/embedding.py`)
    .pinned/READER-KEY  hard link to it, while a reader needs it (`lm_worker/pins.py`)
    .incoming/NUMBER    an embedding that is still being written (`lm_worker/incoming.py`)
    .free/NUMBER        file of an evicted embedding, whose pages the next one reuses (`lm_worker/free_files.py`)
    .expected/KEY       an embedding that is being encoded; it is expected until the file's modification time
    .waiting            its modification time is when all of vLLM's work waited for expected embeddings last

A key has no dot, so none can name one of the folders or files beside it. These modification times are monotonic.
"""

import contextlib
import hashlib
import math
import mmap
import os
import shutil
import time
from pathlib import Path

from common import embedding
from common.embedding import Header

PINNED = ".pinned"
INCOMING = ".incoming"
FREE = ".free"
EXPECTED = ".expected"
WAITING = ".waiting"

_ROOT = Path("/dev/shm")
_MAX_DEFAULT_BUDGET_BYTES = 8 << 30


def folder_of(listen: str) -> Path:
    """The folder of the language worker whose sink listens at `listen`.

    It depends on the address only, so that a worker finds and removes the folder of a killed predecessor.
    """
    return _ROOT / f"dvd-{hashlib.sha256(listen.encode()).hexdigest()[:16]}"


def create_folder(folder: Path) -> None:
    """Create an empty folder; embeddings that a killed predecessor left in it are removed."""
    shutil.rmtree(folder, ignore_errors=True)
    for part in (folder, folder / PINNED, folder / INCOMING, folder / FREE, folder / EXPECTED):
        part.mkdir(mode=0o700)


def remove_folder(folder: Path) -> None:
    """Remove the folder and release its memory. Does nothing if it does not exist."""
    shutil.rmtree(folder, ignore_errors=True)


def default_budget(folder: Path) -> int:
    """Bytes the sink may use by default: a quarter of the file system's free space, at most 8 GiB."""
    status = os.statvfs(folder)
    return min(_MAX_DEFAULT_BUDGET_BYTES, status.f_bavail * status.f_frsize // 4)


def read_header(path: Path) -> Header:
    """Read the header of an embedding's file. Raises `FileNotFoundError`, `InvalidRequest`."""
    with path.open("rb") as file:
        return embedding.parse_header(file.read(embedding.HEADER_SIZE))


def map_embedding(path: Path) -> tuple[Header, mmap.mmap]:
    """Map an embedding's file into memory.

    Returns:
        The header, and a copy-on-write mapping of the whole file. The values begin at `embedding.HEADER_SIZE`. The
        mapping stays valid after the file is removed.

    Raises:
        FileNotFoundError: The file does not exist.
        InvalidRequest: The file does not begin with an embedding's header.
    """
    with path.open("rb") as file:
        # ACCESS_COPY, although nothing is written and no page copied: torch warns about read-only buffers
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return embedding.parse_header(memoryview(mapping)[: embedding.HEADER_SIZE]), mapping


def mark_expected(folder: Path, key: str, seconds: float) -> None:
    """Note that the embedding `key` may still arrive within so many seconds: readers wait for it."""
    _write_time(folder / EXPECTED / key, time.monotonic() + seconds)


def unmark_expected(folder: Path, key: str) -> None:
    """Remove the mark of `mark_expected`, if there is one."""
    (folder / EXPECTED / key).unlink(missing_ok=True)


def is_expected(folder: Path, key: str) -> bool:
    """Whether the embedding `key`, which is missing, may still arrive."""
    return _read_time(folder / EXPECTED / key) > time.monotonic()


def mark_waiting(folder: Path) -> None:
    """Note that all of vLLM's work waits for expected embeddings now."""
    _write_time(folder / WAITING, time.monotonic())


def seconds_since_waiting(folder: Path) -> float:
    """Seconds since the last `mark_waiting`; infinite if there was none."""
    return time.monotonic() - _read_time(folder / WAITING)


def _write_time(file: Path, seconds: float) -> None:
    """Store a monotonic time, which all processes of a machine share, as the modification time of a file."""
    with contextlib.suppress(OSError):  # no memory left: it is then as if the time were not known
        file.touch(mode=0o600)
        os.utime(file, (seconds, seconds))


def _read_time(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return -math.inf

"""The store of the sink: tracks the embeddings in shared memory, keeps to the budget, and evicts."""

import contextlib
import errno
import os
import resource
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common import embedding, errors
from common.embedding import Header
from lm_worker.free_files import FreeFiles
from lm_worker.incoming import IncomingFile
from lm_worker.pending import PendingDeliveries
from lm_worker.shared_memory import INCOMING
from lm_worker.slot_file import DESCRIPTORS, SlotFile

_FULL_RETRY_SECONDS = 1
MAX_DESCRIPTORS = 1 << 16
"""Descriptors of a sink at most. A system may allow more, but its limit of mappings (`vm.max_map_count`) is as low as this."""
_DESCRIPTORS_SHARE = 0.25
"""Largest share of the process' descriptors that embeddings have; others are opened again when their file is reused."""


@dataclass
class _Entry:
    """An embedding in the store.

    Attributes:
        rows: Visual tokens.
        size: Bytes of the file, header included.
        leased_until: Monotonic time until which it is not evicted, unless it has been used (see `Store`).
        requests: Number of requests for it, before its delivery and since it was last evictable.
        changed_ns: Change time of the file at the last request. Pinning and unpinning update the file's change time.
        file: The open file; None if too many are open.
    """

    rows: int
    size: int
    leased_until: float
    requests: int
    changed_ns: int
    file: SlotFile | None


class Store:
    """Owns the folder of embeddings and its budget, in the sink's process. Not thread-safe.

    The least recently used embedding is evicted first. An embedding is not evicted while a reader has pinned it, nor for
    `lease` seconds after it was delivered or requested. The lease ends early if exactly one request needed the embedding
    and has pinned and unpinned it.

    The file of an evicted embedding is reused for the next one, unless a process still has it open. Free files and embeddings
    together keep to the budget.

    Attributes:
        folder: Where the embeddings are (`lm_worker/shared_memory.py`).
        budget: Bytes that may be used.
        used: Bytes in use, files that are being received included.
        evictions: Number of embeddings evicted so far.
    """

    def __init__(self, folder: Path, budget: int, lease: float) -> None:
        """`budget` in bytes, `lease` in seconds."""
        self.folder = folder
        self.budget = budget
        self.used = 0
        self.evictions = 0
        self._incoming = folder / INCOMING
        self._lease = lease
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._pending = PendingDeliveries(folder, lease)
        self._free = FreeFiles(folder)
        self._writes = 0
        self._open_files = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def rows(self, key: str, expect_seconds: float = 0) -> int:
        """Visual tokens stored under `key`; 0 if it is not stored. Counts as a request: renews the lease.

        Args:
            key: Key of the embedding.
            expect_seconds: Time in which it may be delivered if it is not stored; vLLM waits for it so long. 0: unknown.
        """
        leased_until = time.monotonic() + self._lease
        entry = self._entries.get(key)
        if entry is None:
            self._pending.record_request(key, expect_seconds)
            return 0
        file = self._file_status(key)
        entry.requests = 1 if self._is_evictable(entry, file) else entry.requests + 1
        entry.changed_ns, entry.leased_until = file.st_ctime_ns, leased_until
        self._entries.move_to_end(key)
        return entry.rows

    @contextlib.contextmanager
    def writing(self, header: Header) -> Iterator[IncomingFile]:
        """Receive one embedding. It becomes visible under its key when the block ends without an error.

        A file appears under its key by `rename`: complete or not at all. After an error the file is removed and not reused,
        since its sender may still be about to write.

        Raises:
            SinkFull: The budget cannot be met without evicting what is in use, or the file system is full.
            InvalidRequest: Values are missing at the end of the block.
        """
        size = embedding.HEADER_SIZE + header.length
        self._evict_until_fits(size)
        self.used += size
        self._writes += 1
        temporary = self._incoming / str(self._writes)
        file = self._free.take(temporary, size)
        try:
            self._free.trim(self.budget - self.used)
            file = file or SlotFile(temporary)
            incoming = IncomingFile(temporary, header, file)
            yield incoming
            incoming.finish()
            self._publish(header, temporary, size, file)
        except BaseException as error:
            self.used -= size
            temporary.unlink(missing_ok=True)
            if file is not None:
                file.close()
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise errors.SinkFull(
                    f"The file system of {self.folder} is full; enlarge it (shm_size) or lower --sink-bytes."
                ) from None
            raise

    def _publish(self, header: Header, temporary: Path, size: int, file: SlotFile) -> None:
        if header.key in self._entries:  # values of a key are equal: keep the older file, which may be pinned
            raise errors.InvalidRequest(f"Embedding {header.key} is being delivered twice at the same time.")
        os.rename(temporary, self._path(header.key))
        requests = self._pending.forget(header.key)
        self._entries[header.key] = _Entry(
            rows=header.rows,
            size=size,
            leased_until=time.monotonic() + self._lease,
            requests=requests or 1,
            changed_ns=self._file_status(header.key).st_ctime_ns,
            file=self._keep_open(file),
        )

    def _keep_open(self, file: SlotFile) -> SlotFile | None:
        if self._open_files >= self._max_open_files():
            file.close()
            return None
        self._open_files += 1
        return file

    @staticmethod
    def _max_open_files() -> int:
        limit = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], MAX_DESCRIPTORS)
        return int(_DESCRIPTORS_SHARE * limit) // DESCRIPTORS

    def _evict_until_fits(self, size: int) -> None:
        if size > self.budget:
            raise errors.SinkFull(
                f"An embedding of {size} bytes exceeds the sink's budget of {self.budget}; raise --sink-bytes."
            )
        excess = self.used + size - self.budget
        evicted = list[str]()
        for key, entry in self._entries.items():
            if excess <= 0:
                break
            if self._is_evictable(entry, self._file_status(key)):
                evicted.append(key)
                excess -= entry.size
        for key in evicted:
            self._evict(key)
        if self.used + size > self.budget:
            raise errors.SinkFull(
                f"The sink is full: {self.used} of {self.budget} bytes are in use. Retry, or raise --sink-bytes.",
                retry_after=_FULL_RETRY_SECONDS,
            )

    def _is_evictable(self, entry: _Entry, file: os.stat_result) -> bool:
        pinned = file.st_nlink > 1
        served = entry.requests == 1 and file.st_ctime_ns != entry.changed_ns
        return not pinned and (served or entry.leased_until < time.monotonic())

    def _file_status(self, key: str) -> os.stat_result:
        return os.stat(self._path(key))

    def _path(self, key: str) -> str:
        return f"{self.folder}/{key}"  # a `Path` takes longer to make than the file to rename

    def _evict(self, key: str) -> None:
        entry = self._entries.pop(key)
        self.used -= entry.size
        self.evictions += 1
        if entry.file is not None:
            self._open_files -= 1
        self._free.add(self._path(key), entry.size, entry.file)

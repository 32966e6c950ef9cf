"""Pins protect an embedding from eviction while a reader in vLLM uses it."""

import functools
import os
import secrets
from pathlib import Path

from common.embedding import validate_key
from lm_worker.shared_memory import PINNED

_MAX_TRIES = 10
"""Attempts to pin an embedding that is evicted and delivered anew each time."""


class Pins:
    """Pins embeddings on behalf of one reader.

    A pin is a hard link in `.pinned/`: the file stays available to the reader, and the link count tells the sink, which
    is another process, not to evict it. Links carry a random prefix, because the schedulers of vLLM's data parallelism
    share the folder. Pins are counted per key. Not thread-safe.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._prefix = secrets.token_hex(4)
        self._counts: dict[str, int] = {}

    def is_pinned(self, key: str) -> bool:
        """Whether this reader has pinned `key`."""
        return key in self._counts

    def path(self, key: str) -> Path:
        """Path of a pinned embedding; it stays valid when the sink's own file is evicted."""
        return self._folder / PINNED / f"{self._prefix}-{key}"

    def pin(self, key: str) -> bool:
        """Pin `key` once more. Returns False if the embedding does not exist. Raises `InvalidRequest`, `OSError`."""
        if key not in self._counts and not self._link(self._folder / validate_key(key), self.path(key)):
            return False
        self._counts[key] = self._counts.get(key, 0) + 1
        return True

    @staticmethod
    def _link(embedding: Path, pin: Path) -> bool:
        """Link a pin to an embedding. Returns False if there is none.

        Between finding the file by its name and linking it, the kernel lets a rename happen: the sink may have evicted the
        file, have found it unshared, and overwrite it. If the name is still the file's once the link exists, the sink sees it.
        """
        for _ in range(_MAX_TRIES):
            try:
                os.link(embedding, pin)
                if os.path.samefile(embedding, pin):
                    return True
            except FileNotFoundError:
                pin.unlink(missing_ok=True)
                return False
            pin.unlink(missing_ok=True)
        return False

    def unpin(self, key: str) -> None:
        """Undo one `pin`; the last one removes the link."""
        self._counts[key] -= 1
        if self._counts[key] == 0:
            del self._counts[key]
            self.path(key).unlink(missing_ok=True)


@functools.cache
def pins_of_process(folder: str) -> Pins:
    """Return the pins of this process' scheduler in a folder: its connector pins, its encoder cache asks what is pinned."""
    return Pins(Path(folder))

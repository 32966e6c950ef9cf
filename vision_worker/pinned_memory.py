"""Memory for copies from a GPU: pinned, so that the GPU writes it itself, and reused, so that no page is faulted in again."""

import threading
import weakref
from collections import Counter

import torch
from torch import Tensor

_MAX_BYTES = 1 << 30
"""Pinned memory at most, used or free: the system cannot swap it. Copies beyond it go to ordinary memory."""


class PinnedMemory:
    """Buffers that can be used again when nothing references them any longer. Thread-safe.

    torch keeps a freed buffer for the next one of its size, rounded up to a power of two, and never returns it to the system.
    So they are counted here by that size.
    """

    def __init__(self, max_bytes: int = _MAX_BYTES) -> None:
        self._max_bytes, self._total = max_bytes, 0
        self._free: Counter[int] = Counter()
        self._lock = threading.RLock()  # garbage collection may release a buffer while the lock is held

    def allocate(self, size: int) -> Tensor:
        """Return uint8 `[size]`, pinned unless there is too much of it, or the system does not allow it."""
        block = 1 << (size - 1).bit_length()
        if not self._take(block):
            return torch.empty(size, dtype=torch.uint8)
        try:
            # an array, since whatever uses the memory references it; of a tensor there may be several objects
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
        except RuntimeError:
            with self._lock:
                self._total -= block
            return torch.empty(size, dtype=torch.uint8)
        weakref.finalize(buffer, self._release, block).atexit = False
        return torch.from_numpy(buffer)

    def _take(self, block: int) -> bool:
        """Take a free block of this size, or count a new one if there may be more."""
        with self._lock:
            if self._free[block]:
                self._free[block] -= 1
            elif self._total + block <= self._max_bytes:
                self._total += block
            else:
                return False
            return True

    def _release(self, block: int) -> None:
        with self._lock:
            self._free[block] += 1

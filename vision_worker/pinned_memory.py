"""Memory for copies from a GPU: pinned, so that the GPU writes it itself, and reused, so that no page is faulted in again."""

import threading
import weakref

import torch
from torch import Tensor

_MAX_BYTES = 1 << 30
"""Pinned memory in use at most: the system cannot swap it, and torch keeps it. Copies beyond it go to ordinary memory."""


class PinnedMemory:
    """Buffers that go back to torch's pool of pinned memory when nothing references them any longer. Thread-safe."""

    def __init__(self, max_bytes: int = _MAX_BYTES) -> None:
        self._max_bytes, self._used = max_bytes, 0
        self._lock = threading.Lock()

    def allocate(self, size: int) -> Tensor:
        """Return uint8 `[size]`, pinned unless too much is in use, or the system does not allow it."""
        rounded = 1 << (size - 1).bit_length()  # what torch takes from its pool
        with self._lock:
            fits = self._used + rounded <= self._max_bytes
            self._used += rounded * fits
        if not fits:
            return torch.empty(size, dtype=torch.uint8)
        try:
            # an array, since whatever uses the memory references it; of a tensor there may be several objects
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
        except RuntimeError:
            self._release(rounded)
            return torch.empty(size, dtype=torch.uint8)
        weakref.finalize(buffer, self._release, rounded).atexit = False
        return torch.from_numpy(buffer)

    def _release(self, size: int) -> None:
        with self._lock:
            self._used -= size

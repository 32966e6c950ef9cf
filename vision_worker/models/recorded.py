"""A tower recorded as CUDA graphs, one for each of some batch sizes.

A graph is launched at once. Without it, the thread that launches hundreds of kernels needs the interpreter for each of them,
which decoding, deliveries and calls of gRPC keep busy, and the GPU waits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def recorded_sizes(largest: int) -> list[int]:
    """Batch sizes to record, in tiles, ascending. At most a fifth of a batch is padding."""
    sizes = [1]
    while sizes[-1] < largest:
        sizes.append(min(largest, sizes[-1] + max(1, sizes[-1] // 4)))
    return sizes


class RecordedTower:
    """Runs a tower by CUDA graphs. Not thread-safe; always used on the same stream.

    A batch size is recorded when a batch of it comes first: warm up with all `warmup_sizes` before other threads use the GPU.

    Args:
        tower: computes on a GPU; it maps a batch [n, …] to a batch [n, …].
        largest: tiles in the largest batch.

    Attributes:
        warmup_sizes: batch sizes in the order in which they are to be recorded: all graphs share their memory, and that of the
            largest batch is enough for the others.
    """

    def __init__(self, tower: Callable[[Tensor], Tensor], largest: int) -> None:
        self._sizes = recorded_sizes(largest)
        self.warmup_sizes = self._sizes[::-1]
        self._tower, self._largest = tower, largest
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def __call__(self, pixels: Tensor) -> Tensor:
        """Run the tower on `pixels` [n, …]; tiles that pad the batch to a recorded size are whatever was there before.

        Raises: RuntimeError if a size is recorded now, and its graph computes something else; what the tower raises.
        """
        size = next(size for size in self._sizes if size >= len(pixels))
        if size not in self._graphs:
            with torch.cuda.device(pixels.device):  # of which a recording takes its stream
                self._record(size, pixels)
        assert self._input is not None
        assert self._output is not None
        self._input[: len(pixels)] = pixels
        self._graphs[size].replay()
        return self._output[: len(pixels)].clone()  # the next replay overwrites it

    def _record(self, size: int, pixels: Tensor) -> None:
        if self._input is None:
            self._input = torch.randn((self._largest, *pixels.shape[1:]), device=pixels.device).to(pixels.dtype)
            self._stream = torch.cuda.Stream(pixels.device)  # type: ignore[no-untyped-call]
        expected = self._tower(self._input[:size])  # libraries choose kernels and create handles outside of the recording
        if self._output is None:
            self._output = expected.new_zeros(self._largest, *expected.shape[1:])
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            self._output[:size] = self._tower(self._input[:size])
        self._pool = self._pool or graph.pool()
        graph.replay()
        _check_equal(self._output[:size], expected)
        self._graphs[size] = graph


def _check_equal(actual: Tensor, expected: Tensor) -> None:
    """Check that a graph computes what it was recorded from: an empty one would give every image the same features."""
    tolerance = 0.1 * float(expected.abs().max())
    if not torch.allclose(actual, expected, rtol=0.1, atol=tolerance, equal_nan=True):
        raise RuntimeError("a CUDA graph of the vision tower computes other features than the tower")

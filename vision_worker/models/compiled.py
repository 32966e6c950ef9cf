"""A tower compiled for a few sizes of batch; on a GPU each size is recorded as a CUDA graph and played back."""

from collections.abc import Callable

import torch
from torch import Tensor

from common.options import ConfigError

_SIZES = 6
"""torch compiles one function for eight shapes at most, and runs it uncompiled from then on without a word."""


def sizes(largest: int) -> list[int]:
    """Of batches, in tiles, ascending: `largest` and its halves, rounded up."""
    found = [largest]
    while found[0] > 1 and len(found) < _SIZES:
        found.insert(0, -(-found[0] // 2))
    return found


class Compiled:
    """Fills a batch up to the next of `sizes`, so that nothing is compiled while requests wait. For one thread only."""

    def __init__(self, tower: Callable[[Tensor], Tensor], largest: int, device: torch.device) -> None:
        self.sizes = sizes(largest)
        graphs = device.type == "cuda"
        self._run = torch.compile(tower, dynamic=False, mode="reduce-overhead" if graphs else None)
        self.to_warm = self.sizes * (2 if graphs else 1)  # a size's first run compiles, its second records the graph

    def __call__(self, pixels: Tensor) -> Tensor:
        """[n, …] to what the tower makes of it. Raises `ConfigError` where torch cannot compile here."""
        size = next(size for size in self.sizes if size >= len(pixels))
        missing = size - len(pixels)
        filled = torch.cat([pixels, pixels.new_zeros(missing, *pixels.shape[1:])]) if missing else pixels
        try:
            # cloned: a graph's output lies where its next run writes, and a group's features wait for later batches
            return self._run(filled)[: len(pixels)].clone()
        except torch._dynamo.exc.TorchDynamoException as error:
            said = str(error).strip().splitlines()[0]
            raise ConfigError(f"--vision-compile: torch cannot compile here ({said}); is there a C++ compiler?") from error

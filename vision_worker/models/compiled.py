"""A tower compiled for a few batch sizes. On a GPU each size is recorded as a CUDA graph and replayed."""

from collections.abc import Callable

import torch
from torch import Tensor

from common.options import ConfigError

_MAX_SIZES = 6
"""torch compiles a function for at most eight shapes, and silently runs it uncompiled for others."""


def batch_sizes(largest: int) -> list[int]:
    """Batch sizes to compile for, in tiles, ascending: `largest` and its halves, rounded up."""
    sizes = [largest]
    while sizes[0] > 1 and len(sizes) < _MAX_SIZES:
        sizes.insert(0, -(-sizes[0] // 2))
    return sizes


class CompiledTower:
    """Runs a tower at a few fixed batch sizes, so that nothing is compiled while requests wait. Not thread-safe.

    Args:
        tower: module to compile; it maps a batch [n, …] to a batch [n, …].
        largest: tiles in the largest batch.
        device: where the tower computes.
    """

    def __init__(self, tower: Callable[[Tensor], Tensor], largest: int, device: torch.device) -> None:
        self.sizes = batch_sizes(largest)
        graphs = device.type == "cuda"
        self._run = torch.compile(tower, dynamic=False, mode="reduce-overhead" if graphs else None)
        # a size's first run compiles it; its second run records the CUDA graph
        self.warmup_sizes = self.sizes * (2 if graphs else 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Run the tower on `pixels` [n, …], padded with zeros to the next compiled size.

        Raises: ConfigError if torch cannot compile on this machine.
        """
        size = next(size for size in self.sizes if size >= len(pixels))
        # always copied into the same layout: a batch with other strides would be compiled anew, while requests wait
        padded = torch.zeros((size, *pixels.shape[1:]), dtype=pixels.dtype, device=pixels.device)
        padded[: len(pixels)] = pixels
        try:
            # cloned: a graph's next run overwrites its output, and a group's features wait for later batches
            return self._run(padded)[: len(pixels)].clone()
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"--vision-compile: torch cannot compile here ({reason}); is a C++ compiler installed?"
            ) from error

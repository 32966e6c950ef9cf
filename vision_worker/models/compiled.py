"""A tower whose layers torch has compiled: once for all layers, and once for all batches of several tiles."""

from typing import cast

import torch
from torch import Tensor, nn

from common.options import ConfigError
from vision_worker.models.intern_vit import InternViT


class CompiledTower:
    """Runs a tower with compiled layers. Not thread-safe.

    The layers share what is compiled, so that compilation takes as long for 45 layers as for one. A whole tower that is
    compiled at once is hardly faster, and takes minutes per batch size.

    Args:
        tower: its layers are compiled when they first run.
    """

    def __init__(self, tower: InternViT) -> None:
        self._tower = tower
        self._compiled = torch.compile(_run_layer)

    @staticmethod
    def warmup_sizes(largest: int) -> list[int]:
        """Batch sizes, in tiles, to run before the first request: torch compiles a batch of one tile apart."""
        return sorted({1, largest}, reverse=True)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Run the tower: see `InternViT.forward`. Raises: ConfigError if torch cannot compile on this machine."""
        try:
            return self._tower.run(pixels, self._run)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"--vision-compile: torch cannot compile here ({reason}); is a C++ compiler installed?"
            ) from error

    def _run(self, layer: nn.Module, x: Tensor) -> Tensor:
        if len(x) > 1:  # of one tile, torch compiles for that size only, and marking it would be an error
            torch._dynamo.mark_dynamic(x, 0)
        return self._compiled(layer, x)


def _run_layer(layer: nn.Module, x: Tensor) -> Tensor:
    return cast(Tensor, layer(x))

"""The compiled tower: batch sizes, padding, and no compilation after warming up."""

import pytest
import torch
from torch import Tensor, nn

from vision_worker.models import compiled
from vision_worker.models.compiled import CompiledTower

CPU = torch.device("cpu")


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x.flatten(1)))


@pytest.mark.parametrize(("largest", "sizes"), [(1, [1]), (4, [1, 2, 4]), (6, [1, 2, 3, 6]), (128, [4, 8, 16, 32, 64, 128])])
def test_batch_sizes_are_the_largest_and_its_halves(largest: int, sizes: list[int]) -> None:
    assert compiled.batch_sizes(largest) == sizes


@torch.inference_mode()
def test_a_padded_batch_has_the_result_of_the_uncompiled_tower() -> None:
    tower = Tower()
    compiled_tower, pixels = CompiledTower(tower, 4, CPU), torch.randn(4, 2, 3)
    for count in range(1, 5):
        torch.testing.assert_close(compiled_tower(pixels[:count]), tower(pixels[:count]))


@torch.inference_mode()
def test_nothing_is_compiled_after_every_size_has_run() -> None:
    compiled_tower = CompiledTower(Tower(), 4, CPU)
    for size in compiled_tower.sizes:
        compiled_tower(torch.randn(size, 2, 3))
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in range(1, 5):
            compiled_tower(torch.randn(count, 2, 3))

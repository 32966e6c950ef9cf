"""The compiled tower: results, one compilation for all layers, and none after warming up."""

import pytest
import torch
from torch import Tensor

from common.layouts.base import Tower
from vision_worker.models.compiled import CompiledTower
from vision_worker.models.intern_vit import InternViT


def tower_of(layers: int, norm: str = "layer_norm") -> InternViT:
    description = Tower(
        hidden_size=16, intermediate_size=32, layers=layers, heads=2, patch_size=4, image_size=8, select_layer=-1, norm=norm,
        norm_eps=1e-6, activation="gelu", qkv_bias=True, qk_norm=norm == "rms_norm",
    )  # fmt: skip
    return InternViT(description, positions=5).eval()


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


def pixels(tiles: int) -> Tensor:
    return torch.randn(tiles, 3, 8, 8)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@torch.inference_mode()
def test_features_are_those_of_the_plain_tower_at_every_size(norm: str) -> None:
    tower = tower_of(3, norm)
    compiled = CompiledTower(tower)
    for tiles in (4, 1, 3, 2, 9):
        batch = pixels(tiles)
        torch.testing.assert_close(compiled(batch), tower(batch))


@pytest.mark.parametrize("layers", [1, 12])
@torch.inference_mode()
def test_all_layers_and_sizes_share_two_compilations(layers: int) -> None:
    compiled = CompiledTower(tower_of(layers))
    for tiles in (*CompiledTower.warmup_sizes(6), 5, 3):
        compiled(pixels(tiles))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("largest", [1, 2, 32])
@torch.inference_mode()
def test_nothing_is_compiled_after_warming_up(largest: int) -> None:
    compiled = CompiledTower(tower_of(2))
    for tiles in CompiledTower.warmup_sizes(largest):
        compiled(pixels(tiles))
    with torch.compiler.set_stance("fail_on_recompile"):
        for tiles in range(1, largest + 1):
            compiled(pixels(tiles))

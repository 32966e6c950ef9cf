"""The tower computes what the one of transformers does, with the same random weights."""

import dataclasses

import pytest
import torch
from transformers import InternVLVisionConfig, InternVLVisionModel

from common.layouts import huggingface
from common.layouts.base import Tower
from vision_worker.models.intern_vit import InternViT, interpolate_positions, required_layers

SMALL = Tower(
    hidden_size=64, intermediate_size=128, layers=3, heads=4, image_size=56, patch_size=14, norm="layer_norm",
    norm_eps=1e-6, activation="gelu", qkv_bias=True, qk_norm=False,
)  # fmt: skip


def our_tower_and_that_of_transformers(tower: Tower) -> tuple[InternViT, InternVLVisionModel]:
    torch.manual_seed(3)
    theirs = InternVLVisionModel(
        InternVLVisionConfig(
            hidden_size=tower.hidden_size,
            intermediate_size=tower.intermediate_size,
            num_hidden_layers=tower.layers,
            num_attention_heads=tower.heads,
            image_size=tower.image_size,
            patch_size=tower.patch_size,
            norm_type=tower.norm,
            layer_norm_eps=tower.norm_eps,
            attention_bias=tower.qkv_bias,
            use_qk_norm=tower.qk_norm,
            use_mask_token=False,
            initializer_range=0.2,
        )
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.2)
    parts: dict[str, list[torch.Tensor]] = {}  # queries, keys and values are fused in ours
    for name, value in theirs.state_dict().items():
        key = huggingface.vision_name("vision_tower." + name)
        if key:
            parts.setdefault(key[0].removeprefix("vision_model."), []).append(value)
    ours = InternViT(tower, positions=(tower.image_size // tower.patch_size) ** 2 + 1)
    names = ours.state_dict().keys()
    ours.load_state_dict({name: torch.cat(tensors) for name, tensors in parts.items() if name in names})
    return ours.eval(), theirs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "rms_norm", "qk_norm": True, "qkv_bias": False},
        {"norm": "rms_norm", "select_layer": -2},
        {"qk_norm": True, "select_layer": -4},
    ],
    ids=["300m", "6b", "last-but-one", "embeddings"],
)
def test_the_selected_hidden_state_is_that_of_transformers(changes: dict[str, object]) -> None:
    tower = dataclasses.replace(SMALL, **changes)  # type: ignore[arg-type]
    ours, theirs = our_tower_and_that_of_transformers(tower)
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        states = theirs(pixels, output_hidden_states=True).hidden_states
        torch.testing.assert_close(ours(pixels), states[tower.select_layer][:, 1:], rtol=1e-5, atol=1e-5)


def test_only_required_layers_are_built() -> None:
    assert required_layers(dataclasses.replace(SMALL, layers=48, select_layer=-4)) == 45
    assert len(InternViT(dataclasses.replace(SMALL, select_layer=-3), 17).encoder.layers) == 1
    assert required_layers(dataclasses.replace(SMALL, select_layer=2)) == 2
    with pytest.raises(ValueError, match="select_layer -5"):
        required_layers(dataclasses.replace(SMALL, select_layer=-5))


def test_positions_are_interpolated_for_another_side() -> None:
    positions = torch.randn(1, 17, 8)
    assert interpolate_positions(positions, 4) is positions
    larger = interpolate_positions(positions.bfloat16(), 8)
    assert larger.shape == (1, 65, 8)
    assert larger.dtype == torch.bfloat16
    flat = interpolate_positions(torch.ones(1, 17, 8), 6)
    torch.testing.assert_close(flat, torch.ones(1, 37, 8))

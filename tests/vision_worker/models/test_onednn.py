"""Layers replaced by oneDNN compute what torch's own do."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.layouts.base import Tower
from tests.vision_worker import golden
from vision_worker.models import onednn
from vision_worker.models.intern_vit import InternViT
from vision_worker.models.onednn import attention, linear, linear_plus
from vision_worker.models.vir import Gating, Pooling

SMALL = Tower(
    hidden_size=64, intermediate_size=128, layers=2, heads=4, image_size=56, patch_size=14, norm="layer_norm",
    norm_eps=1e-6, activation="gelu", qkv_bias=True, qk_norm=False,
)  # fmt: skip


def random_tensor(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def random_model(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.05, 0.2)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("shape", [(1, 24), (3, 1025, 24), (2, 5, 7, 24), (0, 24), (2, 0, 24)], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
@torch.inference_mode()
def test_linear_equals_that_of_torch(shape: tuple[int, ...], has_bias: bool) -> None:
    x, weight, bias = random_tensor(*shape), random_tensor(16, 24), random_tensor(16) if has_bias else None
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), atol=2e-5, rtol=2e-5)


@torch.inference_mode()
def test_gelu_fused_into_linear_equals_that_of_torch() -> None:
    x, weight, bias = 4 * random_tensor(3, 9, 24), random_tensor(16, 24), random_tensor(16)
    torch.testing.assert_close(linear(x, weight, bias, "gelu"), F.gelu(F.linear(x, weight, bias)), atol=2e-5, rtol=2e-5)


@torch.inference_mode()
def test_non_contiguous_tensors_are_multiplied() -> None:
    x, weight = random_tensor(4, 9, 48)[:, 1:, ::2], random_tensor(48, 24)[16:32]
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), atol=2e-5, rtol=2e-5)
    transposed = random_tensor(24, 9).mT
    torch.testing.assert_close(linear(transposed, weight), F.linear(transposed, weight), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("shape", [(1, 24), (3, 1025, 24), (0, 24)], ids=str)
@torch.inference_mode()
def test_a_packed_layer_takes_any_number_of_rows_and_adds_to_a_residual(shape: tuple[int, ...]) -> None:
    plain, x, residual = random_model(nn.Linear(24, 16)), random_tensor(*shape), random_tensor(*shape[:-1], 16)
    packed = copy.deepcopy(plain)
    onednn.optimize(packed)
    torch.testing.assert_close(packed(x), plain(x), atol=2e-5, rtol=2e-5)
    assert isinstance(packed, nn.Linear)
    torch.testing.assert_close(linear_plus(x, packed, residual), residual + plain(x), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("length", [1, 17, 512, 513, 1025])
@torch.inference_mode()
def test_attention_equals_that_of_torch(length: int) -> None:
    q, k, v = (part.view(2, length, 3, 8).transpose(1, 2) for part in random_tensor(2, length, 72).chunk(3, dim=-1))
    torch.testing.assert_close(attention(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "qkv_bias": False}, {"activation": "quick_gelu"}], ids=str)
@pytest.mark.parametrize("has_avx512", [True, False])
@torch.inference_mode()
def test_an_optimized_tower_computes_the_same(
    changes: dict[str, object], has_avx512: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "_HAS_AVX512", has_avx512)
    plain = random_model(InternViT(dataclasses.replace(SMALL, **changes), 17))  # type: ignore[arg-type]
    optimized = copy.deepcopy(plain)
    onednn.optimize(optimized)
    pixels = random_tensor(2, 3, 56, 56)
    torch.testing.assert_close(optimized(pixels), plain(pixels), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_an_optimized_router_computes_the_same() -> None:
    plain = random_model(nn.Sequential(Pooling(64), Gating(64)))
    optimized = copy.deepcopy(plain)
    onednn.optimize(optimized)
    features = random_tensor(3, 16, 64)
    torch.testing.assert_close(optimized(features), plain(features), atol=1e-4, rtol=1e-4)


def test_optimizing_leaves_names_and_shapes_as_they_are() -> None:
    model = nn.Sequential(InternViT(SMALL, 17), Pooling(64), nn.Linear(3, 4))
    before = {name: parameter.shape for name, parameter in model.state_dict().items()}
    onednn.optimize(model)
    assert {name: parameter.shape for name, parameter in model.state_dict().items()} == before


def test_layer_scales_are_part_of_packed_weights() -> None:
    plain = random_model(InternViT(SMALL, 17))
    optimized = copy.deepcopy(plain)
    onednn.optimize(optimized)
    before, after = plain.state_dict(), optimized.state_dict()
    for scale, layer in ("ls1", "attn.proj"), ("ls2", "mlp.fc2"):
        prefix = "encoder.layers.1."
        weight, bias = (f"{prefix}{layer}.{name}" for name in ("weight", "bias"))
        assert after[weight].is_mkldnn, "the packed weight replaces the plain one"
        assert torch.equal(after[weight].to_dense(), before[prefix + scale][:, None] * before[weight])
        assert torch.equal(after[bias], before[prefix + scale] * before[bias])
        assert torch.equal(after[prefix + scale], torch.ones(64))


def replaced(model: nn.Module) -> set[str]:
    """Names of the children that have a replaced layer in them."""
    return {
        name
        for name, child in model.named_children()
        if any(type(part).__module__ == onednn.__name__ for part in child.modules())
    }


def test_a_float32_model_on_a_cpu_is_optimized_when_it_is_loaded() -> None:
    assert replaced(golden.encoder("flash-qwen3").model) == {"vision_model", "mlp1", "mlp2", "pooling_before_gating", "gating"}
    assert not replaced(golden.encoder("flash-qwen3", torch.bfloat16).model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_left_to_torch(dtype: torch.dtype) -> None:
    assert not onednn.is_supported(torch.device("cpu"), dtype)


def test_other_devices_are_left_to_torch() -> None:
    assert not onednn.is_supported(torch.device("cuda"), torch.float32)


def test_torch_without_onednn_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert onednn.is_supported(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not onednn.is_supported(torch.device("cpu"), torch.float32)


def test_a_model_that_is_not_optimized_has_gradients() -> None:
    tower = InternViT(SMALL, 17)
    tower(random_tensor(1, 3, 56, 56)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in tower.parameters())

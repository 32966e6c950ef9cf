"""Products against torch's own."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vision_worker.models import onednn
from vision_worker.models.onednn import Linear, attention, product


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", [(1, 24), (3, 1025, 24), (2, 5, 7, 24), (0, 24), (2, 0, 24)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_a_product_is_that_of_torch(shape: tuple[int, ...], bias: bool) -> None:
    x, weight, added = drawn(*shape), drawn(16, 24), drawn(16) if bias else None
    torch.testing.assert_close(product(x, weight, added), F.linear(x, weight, added), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_gelu_after_a_product_is_that_of_torch(dtype: torch.dtype) -> None:
    layer, x = Linear(24, 16).to(dtype), 4 * drawn(3, 9, 24).to(dtype)
    torch.testing.assert_close(layer.then_gelu(x), F.gelu(F.linear(x, layer.weight, layer.bias)), atol=2e-5, rtol=2e-5)


@torch.inference_mode()
def test_what_lies_apart_in_memory_is_multiplied_too() -> None:
    x, weight = drawn(4, 9, 48)[:, 1:, ::2], drawn(48, 24)[16:32]
    torch.testing.assert_close(product(x, weight), F.linear(x, weight), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(product(drawn(24, 9).mT, weight), F.linear(drawn(24, 9).mT, weight), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("length", [1, 17, 512, 513, 1025])
@torch.inference_mode()
def test_attention_is_that_of_torch(length: int) -> None:
    q, k, v = (part.view(2, length, 3, 8).transpose(1, 2) for part in drawn(2, length, 72).chunk(3, dim=-1))
    torch.testing.assert_close(attention(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=2e-5, rtol=2e-5)


def test_gradients_are_those_of_torch() -> None:
    x, weight = drawn(2, 5, 24).requires_grad_(), drawn(24, 24).requires_grad_()

    def gradients(multiplied: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        heads = multiplied.view(2, 5, 3, 8).transpose(1, 2)
        return torch.autograd.grad(attend(heads, heads, heads).square().sum(), (x, weight))

    ours, theirs = gradients(product(x, weight), attention), gradients(F.linear(x, weight), F.scaled_dot_product_attention)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.inference_mode()
def test_other_dtypes_are_left_to_torch(dtype: torch.dtype) -> None:
    x, weight = drawn(5, 24).to(dtype), drawn(16, 24).to(dtype)
    assert torch.equal(product(x, weight), F.linear(x, weight))
    heads = drawn(1, 2, 5, 8).to(dtype)
    assert torch.equal(attention(heads, heads, heads), F.scaled_dot_product_attention(heads, heads, heads))


@torch.inference_mode()
def test_without_onednn_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_ONEDNN", False)
    x, weight = drawn(5, 24), drawn(16, 24)
    assert torch.equal(product(x, weight), F.linear(x, weight))

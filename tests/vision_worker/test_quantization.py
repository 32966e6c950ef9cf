"""Embeddings as bytes: bounds of the error of narrow dtypes, rows of zeros, values that cannot be encoded."""

import numpy as np
import pytest
import torch

from common import errors
from common.embedding import LARGEST_CODES, MAX_NARROW_MAGNITUDE, Header, check_values
from tests.vision_worker import golden
from vision_worker.quantization import EMBEDDING_DTYPES, NARROW_DTYPES, convert, join, quantize, view

NARROW = sorted(NARROW_DTYPES)
TINY = float(torch.finfo(torch.float32).tiny)


def random_tokens(rows: int = 64, width: int = 100) -> torch.Tensor:
    """Rows of very different magnitudes, with some values far larger than the others, as a language model's input has."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(rows, width, generator=generator) * torch.logspace(-30, 3, rows)[:, None]
    tokens[:, 3] *= 40
    return tokens


def dequantized(scales: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """In float64, so that only the quantisation has rounded."""
    return codes.to(torch.float32).double() * scales.double()[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_int8_value_differs_by_at_most_half_a_step(dtype: torch.dtype) -> None:
    tokens = random_tokens().to(dtype)
    scales, codes = quantize(tokens, torch.int8)
    largest = tokens.double().abs().amax(1)
    error = (dequantized(scales, codes) - tokens.double()).abs().amax(1)
    rounding = 1 + 1e-6 * 127  # of the scale and the quotient, to float32
    assert (error <= largest / 127 / 2 * rounding).all()
    assert (error > largest / 127 / 8).all(), "a row without any error is no test"


def test_an_fp8_value_differs_by_at_most_a_sixteenth_or_half_the_smallest_step() -> None:
    tokens = random_tokens()
    scales, codes = quantize(tokens, torch.float8_e4m3fn)
    error = (dequantized(scales, codes) - tokens.double()).abs()
    smallest_step = scales.double()[:, None] * 2**-9
    assert (error <= torch.maximum(tokens.double().abs() / 16, smallest_step / 2) * (1 + 1e-6)).all()
    assert float(error.max()) > 0


@pytest.mark.parametrize("name", NARROW)
def test_the_largest_value_of_a_row_becomes_the_largest_code(name: str) -> None:
    tokens = random_tokens()
    scales, codes = quantize(tokens, NARROW_DTYPES[name])
    assert codes.dtype == NARROW_DTYPES[name]
    assert scales.dtype == torch.float32
    assert (codes.float().abs().amax(1) == LARGEST_CODES[name]).all()
    assert torch.equal(codes.float().sign(), torch.where(codes.float() == 0, 0.0, tokens.sign()))


def test_int8_codes_are_rounded_to_nearest_and_ties_to_even() -> None:
    tokens = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.50001, 126.5]])
    scales, codes = quantize(tokens, torch.int8)
    assert (scales.item(), codes.tolist()) == (1.0, [[127, 0, 2, 2, 0, -2, 1, 126]])


@pytest.mark.parametrize("name", NARROW)
def test_rows_of_zeros_and_almost_zeros_are_zeros(name: str) -> None:
    tokens = torch.zeros(4, 8)
    tokens[1] = TINY / 4  # smaller than any normal number
    tokens[2] = TINY * 100  # its scale would be so
    tokens[3, 0] = 1
    scales, codes = quantize(tokens, NARROW_DTYPES[name])
    assert scales[:3].tolist() == [0, 0, 0]
    assert not codes[:3].float().any()
    assert codes[3].float().tolist() == [LARGEST_CODES[name], *[0.0] * 7]


@pytest.mark.parametrize("name", sorted(EMBEDDING_DTYPES))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_an_error(name: str, bad: float) -> None:
    tokens = random_tokens()
    tokens[5, 3] = bad
    with pytest.raises(errors.InternalError, match="infinite or undefined values"):
        convert(tokens, EMBEDDING_DTYPES[name])


@pytest.mark.parametrize("name", NARROW)
def test_a_narrow_value_must_be_finite_in_every_dtype_of_a_language_model(name: str) -> None:
    tokens = torch.full((2, 4), MAX_NARROW_MAGNITUDE)
    scales, codes = quantize(tokens, NARROW_DTYPES[name])
    assert torch.isfinite((codes.float() * scales[:, None]).to(torch.float16)).all()
    check_values(Header("key", "", name, 2, 4), view(join((scales, codes), slice(0, 2))))
    tokens[1, 1] = MAX_NARROW_MAGNITUDE + 32
    with pytest.raises(
        errors.InternalError, match=r"65536, and narrow embeddings have at most 65504; .*--embedding-dtype=auto"
    ):
        convert(tokens, NARROW_DTYPES[name])


@pytest.mark.parametrize("name", NARROW)
def test_a_row_does_not_depend_on_the_rows_beside_it(name: str) -> None:
    tokens = random_tokens()
    scales, codes = quantize(tokens, NARROW_DTYPES[name])
    for row in range(len(tokens)):
        own_scale, own_codes = quantize(tokens[row : row + 1].clone(), NARROW_DTYPES[name])
        assert torch.equal(own_scale[0], scales[row])
        assert torch.equal(own_codes[0].view(torch.uint8), codes[row].view(torch.uint8))


@pytest.mark.parametrize("name", NARROW)
def test_quantising_twice_changes_nothing_more(name: str) -> None:
    scales, codes = quantize(random_tokens(), NARROW_DTYPES[name])
    once = codes.float() * scales[:, None]
    scales, codes = quantize(once, NARROW_DTYPES[name])
    assert torch.allclose(codes.float() * scales[:, None], once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tower", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_the_other_dtypes_are_only_cast(name: str, tower: torch.dtype) -> None:
    tokens = (random_tokens() * 1e-3).to(tower)
    (values,) = convert(tokens, EMBEDDING_DTYPES[name])
    assert torch.equal(values, tokens.to(getattr(torch, name)))


@pytest.mark.parametrize("name", sorted(EMBEDDING_DTYPES))
def test_the_payload_of_some_rows_has_the_length_of_its_header(name: str) -> None:
    parts = convert(random_tokens(rows=9, width=5) * 1e-3, EMBEDDING_DTYPES[name])
    payload = view(join(parts, slice(2, 6)))
    assert len(payload) == Header("key", "", name, 4, 5).length
    assert bytes(payload) == b"".join(part[2:6].contiguous().view(torch.uint8).numpy().tobytes() for part in parts)


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("checkpoint", golden.NAMES)
def test_real_embeddings_keep_their_direction(checkpoint: str, name: str) -> None:
    case = golden.cases(checkpoint)[0]
    tokens = torch.cat(golden.embed(case, torch.float32).blocks)
    scales, codes = quantize(tokens, NARROW_DTYPES[name])
    assert golden.relative_error(codes.float() * scales[:, None], tokens) < {"int8": 0.012, "fp8": 0.04}[name]

"""The header of an embedding, and the check of its values."""

import numpy as np
import pytest

from common import errors
from common.embedding import HEADER_SIZE, Header, check_finite, check_values, parse_header

HEADER = Header("k" * 64, "f" * 64, "bfloat16", 256, 4096)


def test_a_packed_header_is_parsed() -> None:
    packed = HEADER.pack()
    assert len(packed) == HEADER_SIZE
    assert parse_header(packed + b"values") == HEADER
    assert HEADER.length == 256 * 4096 * 2


@pytest.mark.parametrize(
    ("at", "value"), [(0, b"PK\x03\x04"), (4, b"\x02"), (6, b"\x63"), (8, b"\xff"), (12, b"\xff"), (16, b"\x01")]
)
def test_a_damaged_header_is_rejected(at: int, value: bytes) -> None:
    packed = bytearray(HEADER.pack())
    packed[at : at + len(value)] = value
    with pytest.raises(errors.InvalidRequest):
        parse_header(bytes(packed))


def test_a_short_header_is_rejected() -> None:
    with pytest.raises(errors.InvalidRequest, match="got 3"):
        parse_header(b"DVD")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_must_be_finite(bad: float) -> None:
    for dtype, bits in (("float32", 0), ("float16", 0), ("bfloat16", 16)):
        numbers = np.zeros(1000, "float16" if dtype == "float16" else "float32")
        numbers[1] = np.finfo(numbers.dtype).max / 2
        for value in (0.0, bad):
            numbers[-1] = value
            data = (numbers.view("uint32") >> bits).astype("uint16").tobytes() if bits else numbers.tobytes()
            if value == 0.0:
                check_finite(data, dtype)
            else:
                with pytest.raises(errors.InvalidRequest):
                    check_finite(data, dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_each_value_of_16_bits_is_judged_right(dtype: str) -> None:
    bits = np.arange(1 << 16, dtype="uint16")
    floats = bits.view("float16") if dtype == "float16" else (bits.astype("uint32") << 16).view("float32")
    check_finite(bits[np.isfinite(floats)].tobytes() * 3, dtype)
    for value in bits[~np.isfinite(floats)]:
        with pytest.raises(errors.InvalidRequest):
            check_finite(np.array([0, value, 0], "uint16").tobytes(), dtype)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_a_narrow_row_has_a_scale_and_a_byte_per_value(dtype: str) -> None:
    header = Header("k", "f", dtype, 256, 4096)
    assert (header.length, header.scales_length) == (256 * (4096 + 4), 256 * 4)
    assert parse_header(header.pack()) == header
    assert HEADER.scales_length == 0


def narrow_payload(scales: list[float], codes: bytes) -> bytes:
    return np.array(scales, "<f4").tobytes() + codes


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize(
    ("scale", "is_valid"),
    [(0.0, True), (1e-30, True), (146.0, True), (-0.0, True), (-1.0, False), (np.nan, False), (np.inf, False), (516.0, False)],
)
def test_scales_must_be_finite_and_in_range(dtype: str, scale: float, is_valid: bool) -> None:
    header = Header("k", "f", dtype, 3, 2)
    payload = narrow_payload([1.0, 1.0, scale], bytes(6))
    for split in (0, 4, 8):
        check_values(header, payload[:split])
        if is_valid:
            check_values(header, payload[split:], split)
        else:
            with pytest.raises(errors.InvalidRequest, match=f"scale {scale:g} of a row"):
                check_values(header, payload[split:], split)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_undefined_fp8_values_are_rejected(code: int) -> None:
    payload = narrow_payload([1.0, 1.0], bytes([0, 0x7E, 0xFE, code]))
    check_values(Header("k", "f", "fp8", 2, 2), payload[:-1])
    check_values(Header("k", "f", "int8", 2, 2), payload)
    with pytest.raises(errors.InvalidRequest, match="undefined fp8"):
        check_values(Header("k", "f", "fp8", 2, 2), payload)
    with pytest.raises(errors.InvalidRequest, match="undefined fp8"):
        check_values(Header("k", "f", "fp8", 2, 2), payload[-1:], offset=len(payload) - 1)


@pytest.mark.parametrize(("start", "end"), [(0, 3), (4, 7), (1, 4), (3, 11)])
def test_a_part_must_not_end_within_a_scale(start: int, end: int) -> None:
    payload = narrow_payload([1.0, 1.0], bytes(8))
    with pytest.raises(errors.InvalidRequest, match="within a scale"):
        check_values(Header("k", "f", "int8", 2, 4), payload[start:end], start)

"""The header of an embedding, and the check of its values."""

import numpy as np
import pytest

from common import errors
from common.embedding import HEADER_SIZE, Header, check_finite, parse_header

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

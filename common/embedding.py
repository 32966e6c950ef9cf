"""Layout of an embedding in memory and in files: a fixed header, then its payload.

The payload is rows × width values, row by row. In a narrow dtype (int8, fp8) the scale of each row comes first, as a float32;
a value is its code times the scale of its row. No code needs alignment, and the scales are aligned like the header.

The header (magic, version, dtype, rows, width, length, fingerprint, key) lets a reader check an embedding wherever it is
stored: in shared memory or a cache. It is not a pickle: reading untrusted bytes must not run code.
"""

import functools
import io
import re
import struct
from dataclasses import dataclass

from common import errors

HEADER_SIZE = 256
MAX_KEY_LENGTH = 128
_KEY = re.compile(rf"[0-9a-zA-Z_-]{{1,{MAX_KEY_LENGTH}}}", re.ASCII)
_MAGIC = b"DVDE"
_VERSION = 1
_LAYOUT = struct.Struct("<4sHHIIQ64s128s")

DTYPE_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1, "fp8": 1}
"""Bytes of a value, by dtype. fp8 is float8_e4m3fn: four bits of exponent, three of mantissa, no infinities."""
LARGEST_CODES = {"int8": 127.0, "fp8": 448.0}
"""Largest code of each narrow dtype: the largest magnitude of a row is encoded as this."""
MAX_NARROW_MAGNITUDE = 65504.0
"""Largest value of a narrow embedding, that of float16: it must be finite in whatever dtype a language model computes in."""
SCALE_BYTES = 4
_DTYPES = tuple(DTYPE_SIZES)
# an integer type of the same size, and the exponent bits: a value with all of them set is infinite or NaN
_EXPONENT_BITS = {"bfloat16": ("<u2", 0x7F80), "float16": ("<u2", 0x7C00), "float32": ("<u4", 0x7F800000)}

_CHECKED_BYTES = 256 << 10
"""Bytes of a block of `check_finite`: they fit the cache of one core."""


def validate_key(key: str) -> str:
    """Return `key` if it is one of an embedding, and so safe as a file name. Raises: `InvalidRequest`."""
    if not _KEY.fullmatch(key):
        raise errors.InvalidRequest(
            f"{key[:MAX_KEY_LENGTH]!a} is not an embedding key: expected 1 to {MAX_KEY_LENGTH} ASCII letters, digits, "
            f"'-' or '_', got {len(key)} characters"
        )
    return key


def payload_bytes(dtype: str, rows: int, width: int) -> int:
    """Return the size of the payload of `rows` visual tokens of `width` values, scales included."""
    row_bytes = width * DTYPE_SIZES[dtype] + (SCALE_BYTES if dtype in LARGEST_CODES else 0)
    return rows * row_bytes


@dataclass(frozen=True)
class Header:
    """Header of an embedding: `rows` visual tokens of `width` values of `dtype`."""

    key: str
    fingerprint: str
    dtype: str
    rows: int
    width: int

    @functools.cached_property
    def length(self) -> int:
        """Bytes of the payload that follows the header."""
        return payload_bytes(self.dtype, self.rows, self.width)

    @property
    def scales_length(self) -> int:
        """Bytes of the scales at the start of the payload; 0 where the dtype is not narrow."""
        return self.rows * SCALE_BYTES if self.dtype in LARGEST_CODES else 0

    def pack(self) -> bytes:
        """Return the header as `HEADER_SIZE` bytes."""
        packed = _LAYOUT.pack(
            _MAGIC, _VERSION, _DTYPES.index(self.dtype), self.rows, self.width, self.length,
            self.fingerprint.encode("ascii"), self.key.encode("ascii"),
        )  # fmt: skip
        return packed.ljust(HEADER_SIZE, b"\0")


def parse_header(data: bytes | memoryview) -> Header:
    """Return the header at the start of `data`. Raises: `InvalidRequest` if it is not a header or contradicts itself."""
    if len(data) < HEADER_SIZE:
        raise errors.InvalidRequest(f"embedding header is too short: expected {HEADER_SIZE} bytes, got {len(data)}")
    magic, version, dtype, rows, width, length, fingerprint, key = _LAYOUT.unpack(bytes(data[: _LAYOUT.size]))
    if magic != _MAGIC or version != _VERSION:
        raise errors.InvalidRequest(
            f"not an embedding header: expected {_MAGIC!r} version {_VERSION}, got {magic!r} version {version}"
        )
    if dtype >= len(_DTYPES):
        raise errors.InvalidRequest(f"embedding header has unknown dtype number {dtype}")
    header = Header(
        key=_parse_text("key", key),
        fingerprint=_parse_text("fingerprint", fingerprint),
        dtype=_DTYPES[dtype],
        rows=rows,
        width=width,
    )
    if header.length != length:
        raise errors.InvalidRequest(
            f"embedding of {rows} × {width} {header.dtype} must have {header.length} bytes, its header has {length}"
        )
    return header


def _parse_text(name: str, field: bytes) -> str:
    try:
        return field.rstrip(b"\0").decode("ascii")
    except UnicodeDecodeError:
        raise errors.InvalidRequest(f"embedding header has a {name} that is not ASCII: {field[:32]!r}") from None


def write_all(file: io.FileIO, data: memoryview) -> None:
    """Write all of `data` to an unbuffered file, whose `write` may write only a part. Raises: `OSError`."""
    while data:
        data = data[file.write(data) :]


def check_values(header: Header, data: bytes | memoryview, offset: int = 0) -> None:
    """Check a part of a payload, whose scales and values must be finite.

    Args:
        header: Header of the embedding.
        data: The part: whole values and whole scales.
        offset: Where it begins in the payload, in bytes.

    Raises:
        InvalidRequest: A value is infinite or NaN, or a scale is that, negative or too large, or cut in two.
    """
    if not header.scales_length:
        check_finite(data, header.dtype)
        return
    # no view of the data in a local variable: the traceback of an error would keep it, and its owner could not be closed
    scale_bytes = min(len(data), max(0, header.scales_length - offset))
    if scale_bytes % SCALE_BYTES or (scale_bytes and offset % SCALE_BYTES):
        raise errors.InvalidRequest(f"a part of the embedding ends within a scale, which has {SCALE_BYTES} bytes")
    largest = MAX_NARROW_MAGNITUDE / LARGEST_CODES[header.dtype]
    if (scale := _first_bad_scale(data, scale_bytes, largest)) is not None:
        raise errors.InvalidRequest(f"embedding has scale {scale:g} of a row; expected 0 to {largest:g} for {header.dtype}")
    if header.dtype == "fp8" and _has_code(data, scale_bytes, 0x7F, 0x7F):
        raise errors.InvalidRequest("embedding contains undefined fp8 values (NaN)")
    if header.dtype == "int8" and _has_code(data, scale_bytes, 0xFF, 0x80):
        raise errors.InvalidRequest("embedding contains the int8 value -128; expected -127 to 127")


def check_finite(data: bytes | memoryview, dtype: str) -> None:
    """Raise `InvalidRequest` if a value is infinite or NaN. An overflow in the tower would spoil each reuse of it.

    `dtype` is not narrow.
    """
    if not _is_finite(data, dtype):  # no array is left that a traceback could keep: `data` may be a mapping to be closed
        raise errors.InvalidRequest("embedding contains infinite or undefined values: does the vision tower run in float16?")


def _is_finite(data: bytes | memoryview, dtype: str) -> bool:
    import numpy as np

    integer, exponent = _EXPONENT_BITS[dtype]
    sign = exponent + (exponent & -exponent)  # the bit above the exponent's
    values = np.frombuffer(data, dtype=integer)
    signed, largest, count = values.view(integer.replace("u", "i")), np.maximum.reduce, _CHECKED_BYTES // values.itemsize
    # Values with all exponent bits set are the largest of their sign: a maximum for each sign needs no temporary array. In
    # blocks, so that the second one finds the values in the processor's cache.
    for start in range(0, len(values), count):
        end = start + count
        if largest(values[start:end]) >= exponent | sign or largest(signed[start:end]) >= exponent:
            return False
    return True


def _first_bad_scale(data: bytes | memoryview, scale_bytes: int, largest: float) -> float | None:
    import numpy as np

    scales = np.frombuffer(data, dtype="<f4", count=scale_bytes // SCALE_BYTES)
    allowed = (scales >= 0) & (scales <= np.float32(largest))  # False for NaN
    return None if bool(allowed.all()) else float(scales[~allowed][0])


def _has_code(data: bytes | memoryview, offset: int, mask: int, code: int) -> bool:
    """Whether a value from `offset` on has this code, of the bits in `mask`."""
    import numpy as np

    return bool(np.any((np.frombuffer(data, dtype=np.uint8)[offset:] & mask) == code))

"""Layout of an embedding in memory and in files: a fixed header, then rows × width values, row by row.

The header (magic, version, dtype, rows, width, length, fingerprint, key) lets a reader check an embedding wherever it is
stored: in shared memory or a cache. It is not a pickle: reading untrusted bytes must not run code.
"""

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

DTYPE_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
_DTYPES = tuple(DTYPE_SIZES)
# an integer type of the same size, and the exponent bits: a value with all of them set is infinite or NaN
_EXPONENT_BITS = {"bfloat16": ("<u2", 0x7F80), "float16": ("<u2", 0x7C00), "float32": ("<u4", 0x7F800000)}

_CHECKED_VALUES = 1 << 16
"""Values of a block of `check_finite`."""


def validate_key(key: str) -> str:
    """Return `key` if it is one of an embedding, and so safe as a file name. Raises: `InvalidRequest`."""
    if not _KEY.fullmatch(key):
        raise errors.InvalidRequest(
            f"{key[:MAX_KEY_LENGTH]!a} is not an embedding key: expected 1 to {MAX_KEY_LENGTH} ASCII letters, digits, "
            f"'-' or '_', got {len(key)} characters"
        )
    return key


@dataclass(frozen=True)
class Header:
    """Header of an embedding: `rows` visual tokens of `width` values of `dtype`."""

    key: str
    fingerprint: str
    dtype: str
    rows: int
    width: int

    @property
    def length(self) -> int:
        """Bytes of the values that follow the header."""
        return self.rows * self.width * DTYPE_SIZES[self.dtype]

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


def check_finite(data: bytes | memoryview, dtype: str) -> None:
    """Raise `InvalidRequest` if a value is infinite or NaN. An overflow in the tower would spoil each reuse of it."""
    if not _is_finite(data, dtype):  # no array is left that a traceback could keep: `data` may be a mapping to be closed
        raise errors.InvalidRequest("embedding contains infinite or undefined values: does the vision tower run in float16?")


def _is_finite(data: bytes | memoryview, dtype: str) -> bool:
    import numpy as np

    integer, exponent = _EXPONENT_BITS[dtype]
    sign = exponent + (exponent & -exponent)  # the bit above the exponent's
    values = np.frombuffer(data, dtype=integer)
    # Values with all exponent bits set are the largest of their sign: a maximum for each sign needs no temporary array. In
    # blocks, so that the second one finds the values in the processor's cache.
    for start in range(0, len(values), _CHECKED_VALUES):
        block = values[start : start + _CHECKED_VALUES]
        if block.max() >= exponent | sign or block.view(integer.replace("u", "i")).max() >= exponent:
            return False
    return True

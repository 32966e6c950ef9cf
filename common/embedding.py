"""How an embedding lies in memory and in files: a fixed header, then rows × width values, row by row.

The header is what makes a value checkable wherever it is found (shared memory, a cache): magic, version, dtype, rows,
width, length, fingerprint and key. No pickle anywhere: reading foreign bytes must not run code.
"""

import io
import struct
from dataclasses import dataclass

from common import errors

HEADER_SIZE = 256
_MAGIC = b"DVDE"
_VERSION = 1
_LAYOUT = struct.Struct("<4sHHIIQ64s128s")

DTYPE_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
_DTYPES = tuple(DTYPE_SIZES)
# exponent bits; all of them set means infinite or not a number
_EXPONENT = {"bfloat16": ("<u2", 0x7F80), "float16": ("<u2", 0x7C00), "float32": ("<u4", 0x7F800000)}


@dataclass(frozen=True)
class Header:
    """What an embedding is. `rows` visual tokens of `width` values of `dtype`; `length` bytes follow."""

    key: str
    fingerprint: str
    dtype: str
    rows: int
    width: int

    @property
    def length(self) -> int:
        return self.rows * self.width * DTYPE_SIZES[self.dtype]

    def pack(self) -> bytes:
        """`HEADER_SIZE` bytes."""
        packed = _LAYOUT.pack(
            _MAGIC, _VERSION, _DTYPES.index(self.dtype), self.rows, self.width, self.length,
            self.fingerprint.encode("ascii"), self.key.encode("ascii"),
        )  # fmt: skip
        return packed.ljust(HEADER_SIZE, b"\0")


def parse_header(data: bytes | memoryview) -> Header:
    """The header at the start of `data`. Raises `InvalidRequest` where it is none of ours or contradicts itself."""
    if len(data) < HEADER_SIZE:
        raise errors.InvalidRequest(f"an embedding's header has {HEADER_SIZE} bytes, got {len(data)}")
    magic, version, dtype, rows, width, length, fingerprint, key = _LAYOUT.unpack(bytes(data[: _LAYOUT.size]))
    if magic != _MAGIC or version != _VERSION:
        raise errors.InvalidRequest(f"not an embedding of version {_VERSION}: {magic!r} version {version}")
    if dtype >= len(_DTYPES):
        raise errors.InvalidRequest(f"unknown dtype number {dtype} of an embedding")
    header = Header(
        key=key.rstrip(b"\0").decode("ascii"),
        fingerprint=fingerprint.rstrip(b"\0").decode("ascii"),
        dtype=_DTYPES[dtype],
        rows=rows,
        width=width,
    )
    if header.length != length:
        raise errors.InvalidRequest(f"embedding of {rows} × {width} {header.dtype} claims {length} bytes")
    return header


def write_all(file: io.FileIO, data: memoryview) -> None:
    """An unbuffered file may take less than it is given. Raises `OSError`."""
    while data:
        data = data[file.write(data) :]


def check_finite(data: bytes | memoryview, dtype: str) -> None:
    """Raise `InvalidRequest` where a value is infinite or not a number (a tower overflow would poison every reuse)."""
    import numpy as np

    kind, exponent = _EXPONENT[dtype]
    if bool(np.any((np.frombuffer(data, dtype=kind) & exponent) == exponent)):
        raise errors.InvalidRequest("an embedding holds infinite or undefined values; was the tower run in float16?")

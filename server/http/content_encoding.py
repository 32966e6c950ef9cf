"""Decoding of compressed request bodies: gzip, deflate and zstd, within the limit of a body."""

import sys
import zlib
from collections.abc import Iterator

from common import errors

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

SUPPORTED = ("gzip", "deflate", "zstd")
_ALIASES = {"x-gzip": "gzip"}
_GZIP, _ZLIB, _RAW = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS
"""Formats as zlib numbers them."""
_INPUT_BYTES = 1 << 16
"""Compressed bytes handed to zlib at once. It copies what it leaves of them, so all at once would take quadratic time."""
_OUTPUT_BYTES = 1 << 18
_MAX_MEMBERS = 4096
"""Maximum number of gzip members or zstd frames in a body. An empty one costs time and adds no byte, so the body's limit cannot
bound them."""
_MAX_WINDOW_LOG = 23
"""Largest zstd window as a power of two: 8 MiB, the most that RFC 9659 allows for HTTP. The decoder allocates it at once."""


def parse(headers: list[str]) -> str | None:
    """Return the encoding that `Content-Encoding` headers name, one of `SUPPORTED`; None if the body is not encoded.

    Raises:
        UnsupportedEncoding: They name another encoding, or more than one.
    """
    names = [name.strip().lower() for name in ",".join(headers).split(",")]
    encodings = [_ALIASES.get(name, name) for name in names if name not in ("", "identity")]
    if not encodings:
        return None
    if len(encodings) > 1 or encodings[0] not in SUPPORTED:
        raise errors.UnsupportedEncoding(
            f"Content-Encoding {', '.join(encodings)[:100]!r} is not supported: expected one of {', '.join(SUPPORTED)}, "
            "or a body that is not encoded."
        )
    return encodings[0]


def decode(body: bytes, encoding: str, limit: int) -> bytes:
    """Decode a body. No more than `limit` bytes and one piece are held; it blocks, so it belongs into a thread.

    Raises:
        BodyTooLarge: The decoded body has more than `limit` bytes.
        InvalidRequest: The body is damaged or truncated, or not in this encoding.
    """
    decoded = bytearray()
    try:
        for piece in _decoded_pieces(body, encoding):
            decoded += piece
            if len(decoded) > limit:
                raise errors.BodyTooLarge(
                    f"The body exceeds {limit} bytes once it is decoded: send fewer or smaller images, or their URLs."
                )
    except (zlib.error, zstd.ZstdError, EOFError) as error:
        raise errors.InvalidRequest(
            f"The body ({len(body)} bytes) is not valid {encoding}, which its Content-Encoding names: {error}."
        ) from None
    return bytes(decoded)


def _decoded_pieces(body: bytes, encoding: str) -> Iterator[bytes]:
    if encoding == "zstd":
        return _zstd_pieces(body)
    return _pieces(body, _GZIP if encoding == "gzip" else _deflate_format(body))


def _zstd_pieces(body: bytes) -> Iterator[bytes]:
    """Yield the decoded body in pieces. Raises `ZstdError` or `EOFError` if it is damaged or truncated."""
    stream, frames = _zstd_stream(), 1
    for start in range(0, len(body), _INPUT_BYTES):
        data = body[start : start + _INPUT_BYTES]
        while data or not (stream.eof or stream.needs_input):
            if stream.eof:
                stream, frames = _zstd_stream(), frames + 1
            if frames > _MAX_MEMBERS:
                raise EOFError(f"it has more than {_MAX_MEMBERS} frames")
            yield stream.decompress(data, _OUTPUT_BYTES)
            data = stream.unused_data if stream.eof else b""
    if not stream.eof:
        raise EOFError("it is truncated")


def _zstd_stream() -> "zstd.ZstdDecompressor":
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _MAX_WINDOW_LOG})


def _pieces(body: bytes, stream_format: int) -> Iterator[bytes]:
    """Yield the decoded body in pieces. Raises `zlib.error` or `EOFError` if it is damaged or truncated."""
    stream, members = zlib.decompressobj(stream_format), 1
    for start in range(0, len(body), _INPUT_BYTES):
        data = body[start : start + _INPUT_BYTES]
        while data:
            if stream.eof and not (data := data.lstrip(b"\0")):  # padding, which gzip ignores too
                break
            if stream.eof:
                stream, members = _next_member(stream_format, members), members + 1
            yield stream.decompress(data, _OUTPUT_BYTES)
            data = stream.unconsumed_tail or stream.unused_data
    while not stream.eof:  # output that did not fit into the last piece
        piece = stream.decompress(b"", _OUTPUT_BYTES)
        if not piece and not stream.eof:
            raise EOFError("it is truncated")
        yield piece


def _next_member(stream_format: int, members: int) -> "zlib._Decompress":
    """Return the stream after the first `members` ones: only gzip has more than one."""
    if stream_format != _GZIP or members >= _MAX_MEMBERS:
        raise EOFError("data follows its end" if stream_format != _GZIP else f"it has more than {_MAX_MEMBERS} members")
    return zlib.decompressobj(stream_format)


def _deflate_format(body: bytes) -> int:
    """Return the format of a deflate body: RFC 9110 means zlib's, but many clients send raw deflate."""
    is_zlib = len(body) >= 2 and body[0] & 0x0F == zlib.DEFLATED and int.from_bytes(body[:2], "big") % 31 == 0
    return _ZLIB if is_zlib else _RAW

"""Decoding of `data:` URLs."""

import base64
import binascii
from urllib.parse import unquote_to_bytes

from common import errors

BASE64_PIECE = 1 << 18
"""Characters of base64 decoded at once, which holds the GIL for about a millisecond. A multiple of four."""
_END_OF_TYPE = ";base64,"
_MAX_TYPE_LENGTH = 1024


def decode_data_url(url: str, limit: int) -> bytes:
    """Decode a `data:` URL in base64. Its media type does not matter and may have commas, as in `codecs=vp9,opus`.

    Raises:
        InvalidImage: It is not in base64.
        ImageTooLarge: The file has more than `limit` bytes.
    """
    end = url[:_MAX_TYPE_LENGTH].lower().find(_END_OF_TYPE)
    if end < 0:
        raise errors.InvalidImage("A data: URL must have the form data:image/png;base64,… with the file in base64.")
    payload = url[end + len(_END_OF_TYPE) :]
    if len(payload) // 4 * 3 > limit + 3:
        raise too_large(limit)
    data = _decode_base64(payload)
    if len(data) > limit:
        raise too_large(limit)
    return data


def too_large(limit: int) -> errors.ImageTooLarge:
    """Return the error for a file of more than `limit` bytes."""
    return errors.ImageTooLarge(f"An image or video exceeds {limit} bytes: send a smaller one.")


def _decode_base64(payload: str) -> bytes:
    """Decode base64 strictly, except for what clients send: percent-escapes, line breaks, the URL-safe alphabet, no padding."""
    raw = unquote_to_bytes(payload) if "%" in payload else payload.encode("utf-8", "replace")
    if b"\n" in raw or b"\r" in raw or b" " in raw:
        raw = b"".join(raw.split())
    raw = raw.rstrip(b"=")
    altchars = b"-_" if b"-" in raw or b"_" in raw else None
    try:
        if b"=" in raw:
            raise binascii.Error  # padding inside the data
        # in pieces, so that other threads run in between
        pieces = (raw[start : start + BASE64_PIECE] for start in range(0, len(raw), BASE64_PIECE))
        return b"".join(base64.b64decode(piece + b"=" * (-len(piece) % 4), altchars, validate=True) for piece in pieces)
    except binascii.Error:
        raise errors.InvalidImage(f"A data: URL of {len(payload)} characters is not valid base64.") from None

"""Decoding of `data:` URLs."""

from urllib.parse import unquote_to_bytes

import pybase64

from common import errors

_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")
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
    try:
        return pybase64.b64decode(payload, validate=True)
    except ValueError:
        pass
    try:
        return pybase64.b64decode(_standard_form(payload), validate=True)
    except ValueError:
        raise errors.InvalidImage(f"A data: URL of {len(payload)} characters is not valid base64.") from None


def _standard_form(payload: str) -> bytes:
    """Return base64 with the standard alphabet and with padding, without white space and percent-escapes."""
    raw = unquote_to_bytes(payload) if "%" in payload else payload.encode("utf-8", "replace")
    if b"\n" in raw or b"\r" in raw or b" " in raw:
        raw = b"".join(raw.split())
    raw = raw.translate(_STANDARD_ALPHABET).rstrip(b"=")
    return raw + b"=" * (-len(raw) % 4)

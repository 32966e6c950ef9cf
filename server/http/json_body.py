"""Decoding of JSON request bodies."""

from typing import Any

import msgspec

from common import errors

_decoder = msgspec.json.Decoder()


def decode_object(raw: bytes) -> dict[str, Any]:
    """Decode a body that must be a JSON object in UTF-8.

    Raises:
        InvalidRequest: The body is not JSON, not an object, not UTF-8 (lone surrogates included), nested too deeply, or has a
            number that is not finite.
    """
    try:
        body = _decoder.decode(raw)
    except UnicodeError:
        raise errors.InvalidRequest("The body is not valid UTF-8.") from None
    except RecursionError:
        raise errors.InvalidRequest("The body is nested too deeply.") from None
    except ValueError as error:  # msgspec's errors are ValueErrors
        raise errors.InvalidRequest(f"The body is not valid JSON: {str(error)[:200]}.") from None
    if not isinstance(body, dict):
        raise errors.InvalidRequest(f"The body must be a JSON object, not {type(body).__name__}.")
    return body


def encode(body: dict[str, Any]) -> bytes:
    """Encode a body for vLLM. Raises `InvalidRequest` if it is nested too deeply."""
    try:
        return msgspec.json.encode(body)
    except RecursionError:
        raise errors.InvalidRequest("The body is nested too deeply.") from None

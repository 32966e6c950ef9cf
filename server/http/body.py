"""Reading of request bodies."""

import asyncio

from starlette.requests import Request

from common import errors
from server.http import content_encoding
from server.http.admission import Permit


async def read_body(request: Request, limit: int, permit: Permit) -> bytes:
    """Read a body of at most `limit` bytes, decoded. Its memory is reserved as it arrives.

    Raises:
        BodyTooLarge: The body has more bytes, as it is sent or decoded.
        Overloaded: Other bodies take the memory.
        UnsupportedEncoding: `Content-Encoding` names an encoding that is not supported.
        InvalidRequest: The body is not in the encoding that it names.
    """
    body = await _read(request, limit, permit)
    encoding = content_encoding.parse(request.headers.getlist("content-encoding"))
    if encoding is None:
        return body
    # in a thread: a few KB may expand to the limit
    decoded = await asyncio.to_thread(content_encoding.decode, body, encoding, limit)
    permit.add_bytes(max(len(decoded) - len(body), 0))
    return decoded


async def _read(request: Request, limit: int, permit: Permit) -> bytes:
    """Read a body as it is sent. Raises `BodyTooLarge`, `Overloaded`.

    Up to twice the limit is read, and discarded if it is refused: a client that is cut off may never see the error.
    """
    body, size = bytearray(), 0
    refusal: errors.Overloaded | None = None
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit and refusal is None:
            try:
                permit.add_bytes(len(chunk))
                body += chunk
            except errors.Overloaded as error:
                refusal = error
                body.clear()
                permit.release_bytes()
        elif size > 2 * limit:
            break
    if refusal is not None:
        raise refusal
    if size > limit:
        raise errors.BodyTooLarge(f"The body exceeds {limit} bytes: send fewer or smaller images, or their URLs.")
    return bytes(body)

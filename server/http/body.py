"""Reading of request bodies."""

import asyncio

from starlette.requests import Request

from common import errors
from server.http import content_encoding


async def read_body(request: Request, limit: int) -> bytes:
    """Read a body of at most `limit` bytes, decoded.

    Raises:
        BodyTooLarge: The body has more bytes, as it is sent or decoded.
        UnsupportedEncoding: `Content-Encoding` names an encoding that is not supported.
        InvalidRequest: The body is not in the encoding that it names.
    """
    body = await _read(request, limit)
    encoding = content_encoding.parse(request.headers.getlist("content-encoding"))
    if encoding is None:
        return body
    # in a thread: a few KB may expand to the limit
    return await asyncio.to_thread(content_encoding.decode, body, encoding, limit)


async def _read(request: Request, limit: int) -> bytes:
    """Read a body as it is sent. Raises `BodyTooLarge`.

    Up to twice the limit is read and discarded: a client that is cut off while it sends may never see the error.
    """
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            body += chunk
        elif size > 2 * limit:
            break
    if size > limit:
        raise errors.BodyTooLarge(f"The body exceeds {limit} bytes: send fewer or smaller images, or their URLs.")
    return bytes(body)

"""Reading of request bodies."""

from starlette.requests import Request

from common import errors


async def read_body(request: Request, limit: int) -> bytes:
    """Read a body of at most `limit` bytes. Raises `BodyTooLarge`.

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

"""Reading of request bodies, within bounds of size, memory and speed."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.requests import Request

from common import errors
from server.http import content_encoding
from server.http.admission import BodyMemory

GRACE_SECONDS = 10.0
"""Time that a body may fall behind the minimum speed."""
_SMALL_CHUNK_BYTES = 4096
"""Size of a chunk below which it is copied."""
_LARGE_BODY_BYTES = 1 << 20
"""Size from which on a body is joined in a thread: a millisecond for each megabyte, during which Python holds no GIL."""


@dataclass(frozen=True)
class BodyLimits:
    """Limits of a body.

    Attributes:
        max_bytes: Maximum size in bytes, as it is sent and decoded.
        min_rate: Bytes per second at which it must arrive.
    """

    max_bytes: int
    min_rate: int


async def read_body(request: Request, limits: BodyLimits, memory: BodyMemory) -> bytes:
    """Read a body and decode it. Its memory is reserved as it arrives.

    Raises:
        BodyTooLarge: The body has too many bytes, as it is sent or decoded.
        RequestTooSlow: The body arrives too slowly.
        Overloaded: Other bodies take the memory.
        UnsupportedEncoding: `Content-Encoding` names an encoding that is not supported.
        InvalidRequest: The body is not in the encoding that it names.
    """
    body = await _read(request, limits, memory)
    encoding = content_encoding.parse(request.headers.getlist("content-encoding"))
    if encoding is None:
        return body
    # in a thread: a few KB may expand to the limit
    decoded = await asyncio.to_thread(content_encoding.decode, body, encoding, limits.max_bytes)
    memory.add(max(len(decoded) - len(body), 0))
    return decoded


async def _read(request: Request, limits: BodyLimits, memory: BodyMemory) -> bytes:
    """Read a body as it is sent. Raises `BodyTooLarge`, `RequestTooSlow`, `Overloaded`.

    Up to twice the limit is read, and discarded if it is refused: a client that is cut off may never see the error.
    """
    body, size, limit = _Body(), 0, limits.max_bytes
    refusal: errors.Overloaded | None = None
    async for chunk in _chunks_in_time(request, limits.min_rate):
        size += len(chunk)
        if size <= limit and refusal is None:
            try:
                memory.add(len(chunk))
                body.add(chunk)
            except errors.Overloaded as error:
                refusal = error
                body = _Body()
                memory.release()
        elif size > 2 * limit:
            break
    if refusal is not None:
        raise refusal
    if size > limit:
        raise errors.BodyTooLarge(f"The body exceeds {limit} bytes: send fewer or smaller images, or their URLs.")
    return await body.join()


class _Body:
    """The bytes of a body so far. Large chunks are kept as they are: a buffer that grows is copied again and again."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._small = bytearray()  # chunks that would take more memory than their bytes

    def add(self, chunk: bytes) -> None:
        """Append a chunk."""
        if len(chunk) < _SMALL_CHUNK_BYTES:
            self._small += chunk
        else:
            self._flush()
            self._pieces.append(chunk)

    async def join(self) -> bytes:
        """Return all of it."""
        self._flush()
        if len(self._pieces) == 1:
            return self._pieces[0]
        if sum(map(len, self._pieces)) < _LARGE_BODY_BYTES:
            return b"".join(self._pieces)
        return await asyncio.to_thread(b"".join, self._pieces)

    def _flush(self) -> None:
        if self._small:
            self._pieces.append(bytes(self._small))
            self._small.clear()


async def _chunks_in_time(request: Request, min_rate: int) -> AsyncIterator[bytes]:
    """Yield the chunks of a body. Raises `RequestTooSlow`.

    Bytes that came early buy no more than the grace: else a caller could send most of a large body, and hold its memory.
    """
    clock = asyncio.get_running_loop().time
    chunks, size, deadline = aiter(request.stream()), 0, clock() + GRACE_SECONDS
    while True:
        try:
            async with asyncio.timeout_at(deadline) as timeout:
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except TimeoutError:
            if not timeout.expired():
                raise
            raise errors.RequestTooSlow(
                f"The body stopped after {size} bytes, or arrives too slowly: expected {min_rate} bytes per second "
                f"after {GRACE_SECONDS:g} s (--min-body-rate). Send a smaller body, or URLs of images instead of their bytes."
            ) from None
        size += len(chunk)
        deadline = min(deadline + len(chunk) / min_rate, clock() + GRACE_SECONDS)
        yield chunk

"""The messages of a delivery, as its sink reads them: the header, then values, or that they have been placed."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

from common import embedding_stream, errors
from common.transport import base
from lm_worker.incoming import IncomingFile
from protos import embeddings_pb2 as pb

GRPC = "grpc"
"""Name of the transport by the call itself, in logs and metrics."""


async def receive_values(
    incoming: IncomingFile,
    messages: AsyncIterator[bytes],
    offers: Mapping[str, base.Offer],
    withdraw_offers: Callable[[], None],
) -> str:
    """Receive values until the sender has no more, or has placed all of them. Returns the name of the transport."""
    async for message in messages:
        part = _parse_values(message)
        if isinstance(part, pb.Placed):
            if (offer := offers.get(part.transport)) is None or incoming.bytes_received:
                raise errors.InvalidRequest(
                    f"Values were placed by {part.transport[:20]!a}, which was not offered, or after others were sent."
                )
            await offer.received()
            incoming.mark_placed(part.length)
            return part.transport
        withdraw_offers()  # the sender could not use them
        incoming.add(part)
    return GRPC


class StallTimer:
    """Ends a delivery of which nothing arrives for `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timeout: asyncio.Timeout | None = None

    def restart(self) -> None:
        """Note that something has arrived."""
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time() + self._seconds)

    async def messages(self, messages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield the messages of a delivery. Raises `DeadlineExceeded` if the next one does not arrive in time."""
        iterator = aiter(messages)
        while True:
            try:
                async with asyncio.timeout(self._seconds) as self._timeout:
                    message = await anext(iterator, None)
            except TimeoutError:
                raise errors.DeadlineExceeded(
                    f"The delivery has stalled: no message arrived within {self._seconds:g} s."
                ) from None
            finally:
                self._timeout = None
            if message is None:
                return
            yield message


def _parse_values(message: bytes) -> bytes | memoryview | pb.Placed:
    """Return what is in a message after the first. Raises `InvalidRequest` if it has no values."""
    chunk = embedding_stream.parse_message(message)
    if isinstance(chunk, memoryview):
        return chunk
    part = chunk.WhichOneof("part")
    if part not in ("data", "placed"):
        raise errors.InvalidRequest("A delivery has one header, its first message; expected data in all further ones.")
    return chunk.placed if part == "placed" else chunk.data


async def first_message(messages: AsyncIterator[bytes]) -> pb.EmbeddingHeader:
    """Return the header with which a delivery begins. Raises `InvalidRequest` if its first message is another."""
    message = await anext(aiter(messages), None)
    first = None if message is None else embedding_stream.parse_message(message)
    if first is None or isinstance(first, memoryview) or first.WhichOneof("part") != "header":
        raise errors.InvalidRequest("The first message of a delivery must be its header.")
    return first.header

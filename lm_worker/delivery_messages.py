"""The messages of a delivery, as its sink reads them: the header, then values, or that they have been placed."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable, Mapping

from common import embedding_stream, errors
from common.transport import base, shared_memory
from lm_worker.incoming import IncomingFile
from protos import embeddings_pb2 as pb

GRPC = "grpc"
"""Name of the transport by the call itself, in logs and metrics."""


_MAX_INLINE_CHECK_BYTES = 4 << 20
"""Largest part of an embedding that the event loop checks itself: a thread would take nearly as long to wake up."""


async def receive_values(
    incoming: IncomingFile,
    messages: AsyncIterator[bytes],
    offers: Mapping[str, base.Offer],
    withdraw_offers: Callable[[], None],
    stall: "StallTimer",
) -> str:
    """Receive values until the sender has no more, or has placed all of them. Returns the name of the transport."""
    async for message in messages:
        stall.restart()
        part = _parse_values(message)
        if isinstance(part, pb.Placed):
            _check_transport(incoming, part, offers)
            await _receive_placed(incoming, part, offers[part.transport])
            if not part.partial:
                return part.transport
        else:
            withdraw_offers()  # the sender could not use them
            incoming.add(part)
    return GRPC


def _check_transport(incoming: IncomingFile, placed: pb.Placed, offers: Mapping[str, base.Offer]) -> None:
    """Check that values may be placed like this.

    A slot still has the values of an evicted embedding, and what another transport is about to write there is not placed yet.
    So only what the sender writes itself, into shared memory, may be reported in parts, and then all of it comes like that.
    """
    if placed.transport not in offers:
        raise errors.InvalidRequest(f"Values were placed by {placed.transport[:20]!a}, which was not offered.")
    if placed.transport != shared_memory.NAME and (placed.partial or incoming.bytes_received):
        raise errors.InvalidRequest(
            f"Values were placed by {placed.transport}, in part or after others: expected all of them at once. Only those in "
            "shared memory are reported in parts."
        )


async def _receive_placed(incoming: IncomingFile, placed: pb.Placed, offer: base.Offer) -> None:
    """Wait for values that were placed, and check them."""
    if not placed.partial:
        if placed.length != incoming.header.length:
            raise errors.InvalidRequest(
                f"{placed.length} bytes of values were placed; the header declares {incoming.header.length}."
            )
        await offer.received()
    incoming.mark_placed(placed.length)
    await _check_placed(incoming)


async def _check_placed(incoming: IncomingFile) -> None:
    if incoming.bytes_unchecked > _MAX_INLINE_CHECK_BYTES:  # it would block the event loop
        await asyncio.to_thread(incoming.check_placed)
    else:
        incoming.check_placed()


class StallTimer:
    """Ends a delivery of which nothing arrives for `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timeout: asyncio.Timeout | None = None
        self._end = math.inf

    def restart(self) -> None:
        """Note that something has arrived."""
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(min(asyncio.get_running_loop().time() + self._seconds, self._end))

    @contextlib.asynccontextmanager
    async def limit(self, most_seconds: float = math.inf, length: int = 0) -> AsyncIterator[None]:
        """Raise `DeadlineExceeded` if nothing arrives for so long inside the block.

        Args:
            most_seconds: Time of the block at most, also if something arrives.
            length: Bytes of the delivery, for the error.
        """
        now = asyncio.get_running_loop().time()
        self._end = now + most_seconds
        try:
            async with asyncio.timeout_at(min(now + self._seconds, self._end)) as self._timeout:
                yield
        except TimeoutError:
            if asyncio.get_running_loop().time() >= self._end:
                raise errors.DeadlineExceeded(f"The delivery of {length} bytes took longer than {most_seconds:g} s.") from None
            raise errors.DeadlineExceeded(f"The delivery has stalled: no message arrived within {self._seconds:g} s.") from None
        finally:
            self._timeout = None


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

"""The seam between deliveries and transports, and the negotiation of one of them.

A sender names the transports that it knows in the metadata of its `Deliver` call. The sink prepares a slot for the values
and answers with an offer for each of those that it can use: a short text, whose meaning is the transport's. The sender uses
the first one that works, and otherwise streams the values through the call itself, as do senders and sinks that know no
transports.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Protocol

from common.embedding import Header

_SUPPORTED_KEY = "dvd-transports"  # metadata of the call
_OFFER_PREFIX = "dvd-offer-"  # of initial metadata


OnProgress = Callable[[str, int], None]
"""Called, from any thread, with the name of the transport and the bytes that it has placed so far."""


class Transport(Protocol):
    """The sender's side of a transport to one sink.

    Attributes:
        name: Name in the negotiation: lower-case letters and digits.
    """

    name: ClassVar[str]

    async def place(self, offer: str, header: Header, data: memoryview, on_progress: OnProgress | None = None) -> bool:
        """Write values into the slot of an offer.

        Args:
            offer: What the sink offers. It comes from the network.
            header: Header of the embedding, which the sink has accepted.
            data: Its values, `header.length` bytes.
            on_progress: Called while values are being written, so that the sink checks them meanwhile.

        Returns:
            Whether all values have been written or are on their way. If not, nothing will be written later.
        """
        ...

    async def close(self) -> None:
        """Release what is kept between embeddings."""
        ...


class Slot(Protocol):
    """Where a sink wants the values of one embedding.

    Attributes:
        header: Header of the embedding.
        path: The slot's file, which begins with the header.
    """

    @property
    def header(self) -> Header: ...  # noqa: D102  # see above

    @property
    def path(self) -> Path: ...  # noqa: D102

    def map(self) -> memoryview:
        """View of the whole file, to be released. The values begin at `HEADER_SIZE`. Raises: `OSError`."""
        ...

    def mark_placed(self, count: int) -> None:
        """Note that the first `count` bytes of values are in the slot. Raises: `InvalidRequest` if there are too many."""
        ...

    def check_placed(self) -> None:
        """Check the values that are in the slot and have not been checked yet. Raises: `InvalidRequest`."""
        ...


class Offer(Protocol):
    """An offer of a sink's transport, for one slot.

    Attributes:
        text: What the sender gets.
    """

    text: str

    async def received(self) -> None:
        """Wait until all values that the sender has written are in the slot. Raises: `DvdError` if they do not arrive."""
        ...


class Receiver(Protocol):
    """The sink's side of a transport.

    Attributes:
        name: Name in the negotiation.
    """

    name: ClassVar[str]

    def offer(self, slot: Slot, on_progress: Callable[[], None]) -> AbstractContextManager[Offer]:
        """Offer a slot inside the block; nothing is written into it after the block by this process.

        Args:
            slot: The slot.
            on_progress: Called whenever a part of the values arrives.
        """
        ...


def supported_metadata(names: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Metadata of a call by which a sender names its transports."""
    text = ",".join(names)
    return ((_SUPPORTED_KEY, text),) if text else ()


def supported_names(metadata: Iterable[tuple[str, Any]] | None) -> frozenset[str]:
    """Names of the sender's transports, from the metadata of its call."""
    text = dict(metadata or ()).get(_SUPPORTED_KEY, "")
    return frozenset(text.split(",")) if isinstance(text, str) else frozenset()


def offer_metadata(offers: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Initial metadata by which a sink offers transports, by name. An offer that is not ASCII is left out."""
    return tuple((_OFFER_PREFIX + name, offer) for name, offer in offers.items() if offer.isascii() and offer.isprintable())


def parse_offers(metadata: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """The sink's offers by the name of their transport, from its initial metadata."""
    return {
        key.removeprefix(_OFFER_PREFIX): offer
        for key, offer in metadata
        if key.startswith(_OFFER_PREFIX) and isinstance(offer, str)
    }


async def place(
    transports: Iterable[Transport],
    offers: Mapping[str, str],
    header: Header,
    data: memoryview,
    on_progress: OnProgress | None = None,
) -> str | None:
    """Write values by the first transport that the sink offers and that works. Returns its name; None if none does."""
    for transport in transports:
        offer = offers.get(transport.name)
        if offer is not None and await transport.place(offer, header, data, on_progress):
            return transport.name
    return None

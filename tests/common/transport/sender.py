"""A sender that delivers embeddings until it is killed: `python -m tests.common.transport.sender TRANSPORT ADDRESS NUMBER`.

NUMBER is that of its first embedding. Prints a line when it begins.
"""

import asyncio
import contextlib
import itertools
import sys

import numpy as np

from common import errors
from tests.common.transport.sinks import TRANSPORTS, header_of, values_of
from vision_worker.delivery import SinkChannels

AT_ONCE, MAX_ROWS = 3, 8192


async def _send(transport: str, address: str, first: int) -> None:
    random, numbers = np.random.default_rng(first), itertools.count(first)
    async with SinkChannels(transports=TRANSPORTS[transport]) as sinks:

        async def repeat() -> None:
            for number in numbers:
                header = header_of(number, int(random.integers(1, MAX_ROWS)))
                with contextlib.suppress(errors.SinkFull):
                    await sinks.deliver(address, header, values_of(header), 60)
                    if number == first:
                        print(flush=True)
                if number % 2 and (calls := sinks._sinks[address].direct_calls):
                    await calls.close()  # the first embedding of a connection waits for an offer

        await asyncio.gather(*(repeat() for _ in range(AT_ONCE)))


if __name__ == "__main__":
    asyncio.run(_send(sys.argv[1], sys.argv[2], int(sys.argv[3])))

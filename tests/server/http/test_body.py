"""Reading of request bodies: a body over the limit is read up to twice the limit before it is rejected."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from common import errors
from server.http import body
from server.http.admission import Admission, BodyMemory
from server.http.body import BodyLimits, read_body
from server.metrics import Metrics
from tests.server.http.helpers import body_messages, make_request, receive_messages

LIMITS = BodyLimits(4, 1024)


@pytest.fixture
def memory() -> Iterator[BodyMemory]:
    with Admission(2, 100, Metrics()).body_memory() as memory:
        yield memory


@pytest.mark.parametrize("chunks", [[b""], [b"abcd"], [b"a", b"bc", b"d"]])
async def test_a_body_of_at_most_the_limit_is_returned(chunks: list[bytes], memory: BodyMemory) -> None:
    request = make_request(receive_messages(*body_messages(chunks)))
    assert await read_body(request, LIMITS, memory) == b"".join(chunks)


@pytest.mark.parametrize("sizes", [[4096], [1, 4096, 2, 3, 5000, 1], [0, 4095, 4096, 0], [5000, 1 << 20, 7]])
async def test_chunks_of_any_size_keep_their_order(sizes: list[int]) -> None:
    chunks = [bytes([i]) * size for i, size in enumerate(sizes)]
    with Admission(2, 2 << 20, Metrics()).body_memory() as memory:
        request = make_request(receive_messages(*body_messages(chunks)))
        assert await read_body(request, BodyLimits(2 << 20, 1024), memory) == b"".join(chunks)
        assert memory.size == sum(sizes)


async def test_a_body_over_the_limit_is_read_to_its_end_and_rejected(memory: BodyMemory) -> None:
    receive = receive_messages(*body_messages([b"abc", b"de", b"fgh"]), {"type": "http.disconnect"})
    with pytest.raises(errors.BodyTooLarge, match="exceeds 4 bytes"):
        await read_body(make_request(receive), LIMITS, memory)
    assert await receive() == {"type": "http.disconnect"}


async def test_a_body_over_twice_the_limit_is_not_read_further(memory: BodyMemory) -> None:
    messages = body_messages([b"abcd", b"efgh", b"i", b"j"])
    receive = receive_messages(*messages)
    with pytest.raises(errors.BodyTooLarge):
        await read_body(make_request(receive), LIMITS, memory)
    assert await receive() == messages[3]


async def test_a_body_for_which_there_is_no_memory_is_read_to_its_end_and_refused() -> None:
    admission = Admission(3, 10, Metrics())
    with admission.body_memory() as large, admission.body_memory() as small:
        large.add(9)
        receive = receive_messages(*body_messages([b"a", b"b", b"c"]), {"type": "http.disconnect"})
        with pytest.raises(errors.Overloaded, match="10 bytes of request bodies"):
            await read_body(make_request(receive), LIMITS, small)
        assert await receive() == {"type": "http.disconnect"}
        assert small.size == 0, "nothing of it is held"


def slow_request(chunks: list[bytes], seconds: float) -> Any:
    """Return a request whose chunks arrive this many seconds after each other."""
    messages = body_messages(chunks)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(seconds)
        return messages.pop(0)

    return make_request(receive)


@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param([b"x"] * 200, id="drops"),
        pytest.param([bytes(100_000), *[b"x"] * 200], id="drops after most of it"),
        pytest.param([b"", *[b""] * 200], id="nothing"),
    ],
)
async def test_a_body_that_arrives_too_slowly_is_rejected(chunks: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "GRACE_SECONDS", 0.3)
    admission = Admission(3, 1 << 20, Metrics())
    expected = pytest.raises(errors.RequestTooSlow, match="expected 1024 bytes per second")
    with admission.body_memory() as memory, expected as info:
        await read_body(slow_request(chunks, 0.02), BodyLimits(1 << 20, 1024), memory)
    assert info.value.status == 408
    assert "--min-body-rate" in str(info.value)


async def test_a_body_that_is_fast_enough_may_take_longer_than_the_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "GRACE_SECONDS", 1.0)
    with Admission(3, 1 << 20, Metrics()).body_memory() as memory:
        assert len(await read_body(slow_request([bytes(400)] * 40, 0.05), BodyLimits(1 << 20, 1024), memory)) == 16_000


async def test_the_deadline_of_a_request_holds_while_its_body_arrives(memory: BodyMemory) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await read_body(slow_request([b"a"], 30), LIMITS, memory)

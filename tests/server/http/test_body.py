"""Reading of request bodies: a body over the limit is read up to twice the limit before it is rejected."""

from collections.abc import Iterator

import pytest

from common import errors
from server.http.admission import Admission, Permit
from server.http.body import read_body
from server.metrics import Metrics
from tests.server.http.helpers import body_messages, make_request, receive_messages


@pytest.fixture
def permit() -> Iterator[Permit]:
    with Admission(2, 100, Metrics()).permit() as permit:
        yield permit


@pytest.mark.parametrize("chunks", [[b""], [b"abcd"], [b"a", b"bc", b"d"]])
async def test_a_body_of_at_most_the_limit_is_returned(chunks: list[bytes], permit: Permit) -> None:
    request = make_request(receive_messages(*body_messages(chunks)))
    assert await read_body(request, 4, permit) == b"".join(chunks)


async def test_a_body_over_the_limit_is_read_to_its_end_and_rejected(permit: Permit) -> None:
    receive = receive_messages(*body_messages([b"abc", b"de", b"fgh"]), {"type": "http.disconnect"})
    with pytest.raises(errors.BodyTooLarge, match="exceeds 4 bytes"):
        await read_body(make_request(receive), 4, permit)
    assert await receive() == {"type": "http.disconnect"}


async def test_a_body_over_twice_the_limit_is_not_read_further(permit: Permit) -> None:
    messages = body_messages([b"abcd", b"efgh", b"i", b"j"])
    receive = receive_messages(*messages)
    with pytest.raises(errors.BodyTooLarge):
        await read_body(make_request(receive), 4, permit)
    assert await receive() == messages[3]


async def test_a_body_for_which_there_is_no_memory_is_read_to_its_end_and_refused() -> None:
    admission = Admission(3, 10, Metrics())
    with admission.permit() as large, admission.permit() as small:
        large.add_bytes(9)
        receive = receive_messages(*body_messages([b"a", b"b", b"c"]), {"type": "http.disconnect"})
        with pytest.raises(errors.Overloaded, match="10 bytes of request bodies"):
            await read_body(make_request(receive), 4, small)
        assert await receive() == {"type": "http.disconnect"}
        assert small.body_bytes == 0, "nothing of it is held"

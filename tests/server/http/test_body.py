"""Reading of request bodies: a body over the limit is read up to twice the limit before it is rejected."""

import pytest

from common import errors
from server.http.body import read_body
from tests.server.http.helpers import body_messages, make_request, receive_messages


@pytest.mark.parametrize("chunks", [[b""], [b"abcd"], [b"a", b"bc", b"d"]])
async def test_a_body_of_at_most_the_limit_is_returned(chunks: list[bytes]) -> None:
    request = make_request(receive_messages(*body_messages(chunks)))
    assert await read_body(request, 4) == b"".join(chunks)


async def test_a_body_over_the_limit_is_read_to_its_end_and_rejected() -> None:
    receive = receive_messages(*body_messages([b"abc", b"de", b"fgh"]), {"type": "http.disconnect"})
    with pytest.raises(errors.BodyTooLarge, match="exceeds 4 bytes"):
        await read_body(make_request(receive), 4)
    assert await receive() == {"type": "http.disconnect"}


async def test_a_body_over_twice_the_limit_is_not_read_further() -> None:
    messages = body_messages([b"abcd", b"efgh", b"i", b"j"])
    receive = receive_messages(*messages)
    with pytest.raises(errors.BodyTooLarge):
        await read_body(make_request(receive), 4)
    assert await receive() == messages[3]

"""The timeout of a request. The gateway's tests cover invalid headers, and deadlines in every stage."""

import pytest

from common import errors
from server.http.deadline import HEADER, deadline_exceeded, request_timeout


@pytest.mark.parametrize(
    ("headers", "expected"), [({}, 600.0), ({HEADER: "1.5"}, 1.5), ({HEADER: "0.001"}, 0.001), ({HEADER: "601"}, 600.0)]
)
def test_the_caller_may_shorten_the_timeout(headers: dict[str, str], expected: float) -> None:
    assert request_timeout(headers, 600.0) == expected


def test_the_message_of_an_invalid_header_is_short() -> None:
    with pytest.raises(errors.InvalidRequest, match=r"must be a number of seconds from 0\.001") as error_info:
        request_timeout({HEADER: "x" * 10_000}, 600.0)
    assert len(str(error_info.value)) < 200


def test_the_error_names_the_timeout() -> None:
    assert "after 1.5 s" in str(deadline_exceeded(1.5))

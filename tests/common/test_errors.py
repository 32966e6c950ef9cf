"""The error tree: every class can leave a process by both doors."""

import grpc
import pytest

from common import errors


@pytest.mark.parametrize("error", errors.all_errors(), ids=lambda e: e.__name__)
def test_every_error_has_a_status_and_a_code(error: type[errors.DvdError]) -> None:
    assert 400 <= error.status < 600
    assert isinstance(error.grpc_code, grpc.StatusCode)
    assert error.grpc_code is not grpc.StatusCode.OK
    body = error("what", param="messages").body()["error"]
    assert body == {"message": "what", "type": error.type, "param": "messages", "code": error.code}
    assert error.__name__ in (errors.__doc__ or ""), "the tree at the head of the file shows every class"


def test_codes_are_unique_but_for_the_root() -> None:
    codes = [error.code for error in errors.all_errors() if error is not errors.InternalError]
    assert len(codes) == len(set(codes))
    assert errors.error_class("sink_full") is errors.SinkFull
    assert errors.error_class("of a newer peer") is None

"""The error tree: every class has an HTTP status and a gRPC status."""

import grpc
import pytest

from common import errors


@pytest.mark.parametrize("error", errors.all_errors(), ids=lambda e: e.__name__)
def test_every_error_has_statuses_and_a_body(error: type[errors.DvdError]) -> None:
    assert 400 <= error.status < 600
    assert grpc.StatusCode[error.grpc_code] is not grpc.StatusCode.OK
    body = error("text", param="messages").body()["error"]
    assert body == {"message": "text", "type": error.type, "param": "messages", "code": error.code}
    assert error.__name__ in (errors.__doc__ or ""), "the tree in the docstring of the module shows every class"


def test_an_error_gets_its_location_once() -> None:
    located = errors.InvalidImage("it is empty", retry_after=3).at("images[1]")
    assert (type(located), str(located), located.param) == (errors.InvalidImage, "images[1]: it is empty", "images[1]")
    assert located.retry_after == 3
    assert located.at("images[2]") is located


def test_a_code_belongs_to_one_leaf() -> None:
    """A parent may share its code with one child, which is the class that `error_class` returns."""
    assert issubclass(errors.WorkerUnavailable, errors.Unavailable)
    parents = {errors.DvdError, errors.Unavailable}
    codes = [error.code for error in errors.all_errors() if error not in parents]
    assert len(codes) == len(set(codes))
    assert errors.error_class("sink_full") is errors.SinkFull
    assert errors.error_class("unavailable") is errors.WorkerUnavailable
    assert errors.error_class("internal_error") is errors.InternalError
    assert errors.error_class("from_a_newer_peer") is None

"""API keys and the digest of a caller's credentials. The gateway's tests cover malformed headers."""

import pytest
from pydantic import SecretStr

from common import errors
from server.http.authentication import Authenticator


def test_any_caller_is_accepted_if_no_key_is_configured() -> None:
    authenticator = Authenticator(None)
    anonymous = authenticator.authenticate({})
    assert len(anonymous) == 32
    assert authenticator.authenticate({"authorization": "Bearer a"}) != anonymous


def test_both_headers_of_a_key_identify_the_same_caller() -> None:
    authenticator = Authenticator(SecretStr("a"))
    assert authenticator.authenticate({"authorization": "Bearer a"}) == authenticator.authenticate({"x-api-key": "a"})


def test_the_authorization_header_precedes_x_api_key() -> None:
    with pytest.raises(errors.Unauthorized):
        Authenticator(SecretStr("a")).authenticate({"authorization": "Bearer b", "x-api-key": "a"})


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer b"}, {"authorization": "a"}, {"x-api-key": ""}])
def test_a_missing_or_wrong_key_is_rejected(headers: dict[str, str]) -> None:
    with pytest.raises(errors.Unauthorized, match="Missing or invalid API key"):
        Authenticator(SecretStr("a")).authenticate(headers)

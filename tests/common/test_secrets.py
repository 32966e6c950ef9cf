"""What counts as a secret, and what is left of it."""

import pytest
from pydantic import SecretStr

from common import secrets


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("redis://:pw@cache:6379/0", "redis://***@cache:6379/0"),
        ("rediss://user:p@w@cache", "rediss://***@cache"),
        ("unix:///run/redis?db=1&password=pw", "unix:///run/redis?db=1&password=***"),
        ("redis://cache?Password=pw&db=1", "redis://cache?Password=***&db=1"),
        ("https://a:b＠example.org/", "https://***@example.org/"),
        ("see https://a:b@example.org/x@y and http://c@d", "see https://***@example.org/x@y and http://***@d"),
        ("redis://cache:6379/0", "redis://cache:6379/0"),
        ("https://example.org/a@b", "https://example.org/a@b"),
        ("memory://?bytes=5", "memory://?bytes=5"),
    ],
)
def test_credentials_of_urls_are_masked_and_nothing_else(text: str, redacted: str) -> None:
    assert secrets.redact_url(text) == redacted
    assert secrets.is_secret(text) == (text != redacted)
    assert secrets.redact({"a": [text, 1, None]}) == {"a": [redacted, 1, None]}


def test_a_secret_is_revealed_only_on_request() -> None:
    value = SecretStr("s3cret")
    assert secrets.is_secret(value)
    assert "s3cret" not in repr(value)
    assert secrets.reveal(value) == "s3cret"

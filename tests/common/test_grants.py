"""Grants of deliveries."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from common import grants
from common.embedding import Header
from common.errors import GrantRefused
from common.grants import GrantSigner, SinkGrants
from common.security import OPEN, Credentials
from protos import embeddings_pb2 as pb

SIGNER = GrantSigner(Credentials("a-token-of-this-cluster"))
HEADER = Header("key", "f" * 64, "float32", 4, 8)


def sign(signer: GrantSigner = SIGNER, **changes: Any) -> bytes:
    terms: dict[str, Any] = {"sink": "sink", "key": "key", "max_bytes": HEADER.length, "seconds": 9} | changes
    return signer.sign(address="unix:/sink", **terms)


def altered(grant: bytes) -> bytes:
    """The same grant with other terms under the old signature."""
    parsed = pb.Grant.FromString(grant)
    terms = pb.GrantTerms.FromString(parsed.terms)
    terms.max_bytes *= 2
    return pb.Grant(terms=terms.SerializeToString(), signature=parsed.signature).SerializeToString()


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "none": (lambda: b"", "no grant"),
    "no message": (lambda: b"\xff\xff", "cannot be parsed"),
    "too long": (lambda: sign() + bytes(3000), "cannot be parsed"),
    "another token": (lambda: sign(GrantSigner(Credentials("a-token-of-another-cluster"))), "not signed"),
    "altered": (lambda: altered(sign()), "not signed"),
    "no signature": (lambda: pb.Grant(signature=b"x").SerializeToString(), "not signed"),
    "expired": (lambda: sign(seconds=-grants.CLOCK_TOLERANCE_SECONDS - 1), r"expired \d+ s ago"),
    "another key": (lambda: sign(key="other"), "another embedding"),
    "another sink": (lambda: sign(sink="other"), "another sink"),
    "too large": (lambda: sign(max_bytes=HEADER.length - 1), "its grant allows 127"),
}
"""What makes a grant, and the reason for which it is refused."""


@pytest.mark.parametrize("case", REFUSED)
def test_a_grant_that_does_not_fit_is_refused(case: str) -> None:
    make, message = REFUSED[case]
    grant = make()  # here: a grant that was signed when the tests were collected would have expired
    sink = SinkGrants("sink", SIGNER)
    with pytest.raises(GrantRefused, match=message):
        sink.verify(grant, HEADER)
    sink.verify(sign(), HEADER)


def test_a_grant_is_used_once_however_it_is_encoded() -> None:
    sink, grant = SinkGrants("sink", SIGNER), sign()
    sink.check_unused(grant)
    sink.use(grant)
    parsed = pb.Grant.FromString(grant)
    swapped = pb.Grant(signature=parsed.signature).SerializeToString() + pb.Grant(terms=parsed.terms).SerializeToString()
    assert swapped != grant
    for used in (grant, swapped):
        sink.verify(used, HEADER)
        with pytest.raises(GrantRefused, match="used already"):
            sink.check_unused(used)
    sink.check_unused(sign(seconds=10))


def test_used_grants_are_forgotten_when_they_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = SinkGrants("sink", SIGNER)
    for i in range(100):
        sink.use(sign(seconds=i / 1000))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 100)
    sink.use(sign())
    assert len(sink._used) == 1


def test_a_cluster_without_a_token_has_no_grants() -> None:
    signer = GrantSigner(OPEN)
    assert sign(signer) == b""
    sink = SinkGrants("sink", signer)
    sink.verify(b"", replace(HEADER, rows=999))
    sink.use(b"")
    sink.check_unused(b"")

"""Grants: what allows a vision worker to deliver one embedding to one sink, for a short time.

The gateway signs a grant with a key derived from the cluster token. The vision worker only passes it on; before that it
checks that the grant names the sink that it shall connect to. A cluster without a token has no grants.
"""

import hmac
import time
from collections import OrderedDict

from common import errors
from common.embedding import Header
from common.security import OPEN, Credentials
from protos import embeddings_pb2 as pb

CLOCK_TOLERANCE_SECONDS = 30.0
"""By how much the clocks of two machines may differ."""
_PURPOSE = "dvd grant 1"
_MAX_GRANT_BYTES = 2048


class GrantSigner:
    """Signs grants and verifies them.

    Args:
        credentials: Those of the process. Without a token every grant is empty, and none is demanded.
    """

    def __init__(self, credentials: Credentials) -> None:
        self._key = credentials.derive_key(_PURPOSE)

    @property
    def is_demanded(self) -> bool:
        """Whether a delivery needs a grant."""
        return self._key is not None

    def sign(self, sink: str, address: str, key: str, max_bytes: int, seconds: float) -> bytes:
        """Return a grant.

        Args:
            sink: Id of the sink, from its description.
            address: Address to which the embedding is delivered.
            key: Key of the embedding.
            max_bytes: Largest size of its values.
            seconds: Time for which the grant is valid.
        """
        if self._key is None:
            return b""
        terms = pb.GrantTerms(sink=sink, address=address, key=key, max_bytes=max_bytes, expires=time.time() + seconds)
        text = terms.SerializeToString()
        return pb.Grant(terms=text, signature=hmac.digest(self._key, text, "sha256")).SerializeToString()

    def verify(self, grant: bytes, key: str) -> pb.GrantTerms:
        """Return the terms of a grant for the embedding with this key.

        Raises:
            GrantRefused: There is no grant, it is not signed by this cluster, has expired, or is for another key.
        """
        assert self._key is not None
        if not grant:
            raise errors.GrantRefused("The delivery has no grant; the gateway must have the cluster token too.")
        try:
            parsed = pb.Grant.FromString(grant if len(grant) <= _MAX_GRANT_BYTES else b"\xff")
            terms = pb.GrantTerms.FromString(parsed.terms)
        except Exception:
            raise errors.GrantRefused("The grant of the delivery cannot be parsed.") from None
        if not hmac.compare_digest(parsed.signature, hmac.digest(self._key, parsed.terms, "sha256")):
            raise errors.GrantRefused("The grant of the delivery is not signed with this cluster's token.")
        if not terms.expires + CLOCK_TOLERANCE_SECONDS > time.time():
            raise errors.GrantRefused(
                f"The grant of the delivery expired {time.time() - terms.expires:.0f} s ago; are the machines' clocks equal?"
            )
        if terms.key != key:
            raise errors.GrantRefused("The grant of the delivery is for another embedding.")
        return terms


NO_GRANTS = GrantSigner(OPEN)
"""Of a cluster without a token."""


class SinkGrants:
    """The grants of one sink: verifies each one, and refuses it once its delivery is complete.

    Args:
        sink: Id of the sink.
        signer: Verifies signatures.
    """

    def __init__(self, sink: str, signer: GrantSigner) -> None:
        self._sink, self._signer = sink, signer
        self._used: OrderedDict[bytes, float] = OrderedDict()
        """Terms of grants whose deliveries are complete, and when they expire: few, since only the gateway makes grants."""

    def verify(self, grant: bytes, header: Header) -> None:
        """Check that a delivery is granted. Raises: `GrantRefused`."""
        if not self._signer.is_demanded:
            return
        terms = self._signer.verify(grant, header.key)
        if terms.sink != self._sink:
            raise errors.GrantRefused("The grant of the delivery is for another sink.")
        if header.length > terms.max_bytes:
            raise errors.GrantRefused(f"The embedding has {header.length} bytes; its grant allows {terms.max_bytes}.")

    def check_unused(self, grant: bytes) -> None:
        """Check that no delivery with this grant is complete. Raises: `GrantRefused`."""
        if self._signer.is_demanded and _terms(grant) in self._used:
            raise errors.GrantRefused("The grant of the delivery has been used already.")

    def use(self, grant: bytes) -> None:
        """Refuse a verified grant from now on."""
        if not self._signer.is_demanded:
            return
        now = time.time()
        for old in [old for old, expires in self._used.items() if expires < now]:
            del self._used[old]
        terms = _terms(grant)
        self._used[terms] = pb.GrantTerms.FromString(terms).expires + CLOCK_TOLERANCE_SECONDS


def _terms(grant: bytes) -> bytes:
    # not the grant itself: protobuf has several encodings of one message
    return pb.Grant.FromString(grant).terms

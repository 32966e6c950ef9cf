"""The digest from which keys are made."""

import hashlib


def digest(*fields: bytes) -> bytes:
    """Return the SHA-256 digest of the fields, each with its length, so that no two lists of fields collide."""
    sha256 = hashlib.sha256()
    for field in fields:
        sha256.update(len(field).to_bytes(8, "big"))
        sha256.update(field)
    return sha256.digest()

"""Authentication of callers by API key."""

import functools
import hmac
from collections.abc import Callable, Mapping

from pydantic import SecretStr

from common import errors
from common.security import OPEN, Credentials, scope_of


class Authenticator:
    """Checks a caller's API key, if the operator has set one, and tells callers apart by their credentials.

    Args:
        api_key: The key that callers must have; None: any or none.
        credentials: The salts of callers are derived from its token.
    """

    def __init__(self, api_key: SecretStr | None, credentials: Credentials = OPEN) -> None:
        self._api_key = api_key.get_secret_value() if api_key else None
        # without a secret a salt could be computed, but still not chosen: it is a digest over the caller's scope
        self._salt_key = credentials.derive_key("dvd salt 1") or (self._api_key or "dvd").encode()

    def authenticate(self, headers: Mapping[str, str]) -> bytes:
        """Return the caller's scope: a digest of its key, or, if none is required, of what it has sent as credentials.

        The key is read from `Authorization: Bearer …` or, as Anthropic's clients send it, from `x-api-key`.

        Raises:
            Unauthorized: An API key is required, and it is missing or wrong.
        """
        credentials = headers.get("authorization", "")
        if not credentials and "x-api-key" in headers:
            credentials = f"Bearer {headers['x-api-key']}"
        if self._api_key is not None:
            scheme, _, key = credentials.partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._api_key.encode()):
                raise errors.Unauthorized("Missing or invalid API key: send it as 'Authorization: Bearer …'.")
            return scope_of(self._api_key)
        return scope_of(credentials)

    def cache_salt(self, scope: bytes) -> Callable[[str], str]:
        """Return what makes the salt of vLLM's prefix cache for a caller, from the salt that the caller has sent or ""."""
        return functools.partial(self._salt, scope)

    def _salt(self, scope: bytes, own: str) -> str:
        return hmac.digest(self._salt_key, scope + own.encode(), "sha256").hex()

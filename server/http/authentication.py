"""Authentication of callers by API key."""

import hashlib
import hmac
from collections.abc import Mapping

from pydantic import SecretStr

from common import errors


class Authenticator:
    """Checks a caller's API key, if the operator has set one."""

    def __init__(self, api_key: SecretStr | None) -> None:
        self._api_key = api_key.get_secret_value() if api_key else None

    def authenticate(self, headers: Mapping[str, str]) -> bytes:
        """Return a digest of the caller's credentials.

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
        return hashlib.sha256(credentials.encode()).digest()

"""Secrets in the values of options and in URLs: what must appear in no argument, log line, error or printed configuration."""

import re
from typing import Any

from pydantic import SecretStr

_CREDENTIALS = re.compile(r"(?<=//)[^/?#\s]*[@＠﹫]")
_CREDENTIALS_WITHOUT_SCHEME = re.compile(r"^(['\"]?)[^/?#\s:@＠﹫]+:[^/?#\s@＠﹫]*[@＠﹫]")
_SECRET_FIELD = re.compile(r"((?:^|[?&])(?:password|passwd|secret|token|key|api_key)=)[^&#\s]*", re.IGNORECASE)
_MASK = "***"


def redact_url(text: str) -> str:
    """Return a text with the credentials of its URLs masked: `redis://***@cache:6379/0?password=***`.

    Those of an URL without a scheme are masked at the begin of the text only: `***@cache:6379`.
    """
    text = _CREDENTIALS_WITHOUT_SCHEME.sub(rf"\1{_MASK}@", _CREDENTIALS.sub(f"{_MASK}@", text))
    return _SECRET_FIELD.sub(rf"\1{_MASK}", text)


def is_secret(value: Any) -> bool:
    """Return whether an option's value is a secret, or a URL with one in it."""
    return isinstance(value, SecretStr) or (isinstance(value, str) and redact_url(value) != value)


def reveal(value: Any) -> str:
    """Return the text of a secret, for the environment of a process."""
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def redact(value: Any) -> Any:
    """Return a JSON value with the credentials of all its URLs masked."""
    if isinstance(value, dict):
        return {key: redact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [redact(item) for item in value]
    return redact_url(value) if isinstance(value, str) else value

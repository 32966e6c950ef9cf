"""The deadline of a request: `--request-timeout`, or less if the caller sends `X-Request-Timeout`."""

import re
from collections.abc import Mapping

from common import errors

HEADER = "x-request-timeout"
_SECONDS = re.compile(r"\d{1,6}(\.\d{1,3})?")


def request_timeout(headers: Mapping[str, str], limit: float) -> float:
    """Return the timeout of a request in seconds. Raises `InvalidRequest` if the header is not a positive number."""
    value = headers.get(HEADER)
    if value is None:
        return limit
    if not _SECONDS.fullmatch(value) or not float(value):
        raise errors.InvalidRequest(
            f"X-Request-Timeout must be a number of seconds from 0.001 to 999999.999, such as 30, got {value[:50]!r}."
        )
    return min(float(value), limit)


def deadline_exceeded(timeout: float) -> errors.DeadlineExceeded:
    """Return the error of a request that took `timeout` seconds."""
    return errors.DeadlineExceeded(f"Deadline exceeded after {timeout:g} s (X-Request-Timeout / --request-timeout).")

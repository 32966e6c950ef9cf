"""`dvd drain ADDRESS`: let the process with an admin listener at an address finish its requests and exit."""

import json
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from http import HTTPStatus

from common import errors, logs
from common.admin import DRAIN_PATH, STATUS_PATH
from common.http_get import http_request
from common.options import ConfigError, logging_options, read_options
from common.security import OPEN, TOKEN_REJECTED, Credentials, read_credentials
from dvd.config import DrainOptions

_TIMEOUT_SECONDS = 10.0
_POLL_SECONDS = 0.1


def main(arguments: Sequence[str]) -> None:
    """Print one line about the process at ADDRESS. Exits 1 if it does not drain in time, 2 on an invalid option."""
    try:
        options = read_options(DrainOptions, arguments)
    except ConfigError as error:
        logs.exit_with_error("dvd drain", str(error), logging_options(arguments).log_format, 2)
    try:
        credentials = read_credentials(options)
        start_draining(options.address, credentials)
        state = "draining"
        if options.wait is not None:
            state = f"ended after {wait_until_ended(options.address, options.wait, credentials):.1f} s"
    except errors.DvdError as error:
        logs.exit_with_error("dvd drain", f"{options.address}: {error}", options.log_format)
    logs.print_answer("dvd drain", f"{options.address}: {state}", options.log_format)


def start_draining(address: str, credentials: Credentials = OPEN) -> None:
    """Let a process drain, if it does not yet. Raises `errors.Unavailable` if no admin listener answers."""
    try:
        status, body = http_request("POST", address, DRAIN_PATH, _TIMEOUT_SECONDS, _without_tls(credentials))
    except errors.Unavailable as error:
        raise errors.Unavailable(f"no admin listener answers ({error}): start the process with --admin {address}") from None
    if status == HTTPStatus.UNAUTHORIZED:
        raise errors.Unavailable(TOKEN_REJECTED)
    if status != 202 or _status(body) != "draining":
        raise errors.Unavailable(
            f"this is no admin listener: POST {DRAIN_PATH} returned status {status}, expected 202; "
            "give the address that the process has as --admin"
        )


def wait_until_ended(address: str, timeout: float, credentials: Credentials = OPEN) -> float:
    """Wait until a draining process has ended, or another one serves in its place. Returns the seconds that took.

    Raises:
        errors.DeadlineExceeded: it is still draining after `timeout` seconds.
    """
    started = time.monotonic()
    while (elapsed := time.monotonic() - started) < timeout:
        if not _is_listening(address) or _is_serving(address, credentials):
            return elapsed
        time.sleep(_POLL_SECONDS)
    raise errors.DeadlineExceeded(f"still draining after {timeout:g} s; its --shutdown-grace may be longer than --wait")


def _without_tls(credentials: Credentials) -> Credentials:
    return replace(credentials, tls=None)  # the admin listener has none


def _is_listening(address: str) -> bool:
    """Return whether a process listens, however slow it is to answer."""
    path = address.removeprefix("unix:")
    try:
        if path != address:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(_TIMEOUT_SECONDS)
                probe.connect(path)
        else:
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), _TIMEOUT_SECONDS).close()
    except (ConnectionRefusedError, FileNotFoundError):
        return False
    except OSError:
        return True
    return True


def _is_serving(address: str, credentials: Credentials) -> bool:
    """Return whether the process is another one, which a supervisor has started since."""
    try:
        return _status(http_request("GET", address, STATUS_PATH, _TIMEOUT_SECONDS, _without_tls(credentials))[1]) == "serving"
    except errors.Unavailable:
        return False


def _status(body: bytes) -> object:
    try:
        return json.loads(body)["status"]
    except (ValueError, LookupError, TypeError):
        return None

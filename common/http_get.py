"""HTTP requests without a body over TCP or a Unix socket, with the standard library alone: every container image has it."""

import asyncio
import http.client
import socket

from common import errors
from common.security import OPEN, Credentials, TlsFiles

_MAX_BODY_BYTES = 1 << 20
_OK_TIMEOUT_SECONDS = 5.0


class _UnixConnection(http.client.HTTPConnection):
    """An HTTP connection over the Unix socket at `path`."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class _TlsConnection(http.client.HTTPConnection):
    """An HTTP connection over TLS."""

    def __init__(self, address: str, timeout: float, tls: TlsFiles) -> None:
        super().__init__(address, timeout=timeout)
        self._tls = tls

    def connect(self) -> None:
        super().connect()
        self.sock = self._tls.client_context().wrap_socket(self.sock, server_hostname=self._tls.name or self.host)


async def http_get(address: str, path: str, timeout: float, credentials: Credentials = OPEN) -> tuple[int, bytes]:
    """Return status and body (at most 1 MiB of it) of `GET path`. Proxies of the environment are not used.

    Args:
        address: `HOST:PORT`, `[IPV6]:PORT` or `unix:/PATH`.
        path: path and query of the URL.
        timeout: seconds that each step of the exchange may take.
        credentials: token and TLS of this process.

    Raises:
        errors.Unavailable: nothing listens at the address, or the answer is not HTTP or too late.
    """
    return await asyncio.to_thread(http_request, "GET", address, path, timeout, credentials)


async def http_is_ok(address: str, path: str, credentials: Credentials = OPEN) -> bool:
    """Return whether the HTTP server at `address` answers `GET path` with status 200."""
    try:
        status, _ = await http_get(address, path, _OK_TIMEOUT_SECONDS, credentials)
    except errors.Unavailable:
        return False
    return status == 200


def http_request(method: str, address: str, path: str, timeout: float, credentials: Credentials = OPEN) -> tuple[int, bytes]:
    """Send a request without a body; otherwise like `http_get`, but blocking."""
    connection: http.client.HTTPConnection | None = None
    try:
        if address.startswith("unix:"):
            connection = _UnixConnection(address.removeprefix("unix:"), timeout)
        elif credentials.tls:
            connection = _TlsConnection(address, timeout, credentials.tls)
        else:
            connection = http.client.HTTPConnection(address, timeout=timeout)
        connection.request(method, path, headers=credentials.headers)
        response = connection.getresponse()
        return response.status, response.read(_MAX_BODY_BYTES)
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a host name that cannot be encoded
        raise errors.Unavailable(str(error) or type(error).__name__) from None
    finally:
        if connection is not None:
            connection.close()

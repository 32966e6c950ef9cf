"""The admin listener of a process (`--admin`): plain HTTP that drains it, at an address that no client of the service reaches.

It runs in threads of its own, so it answers while the event loop is busy, and it needs no library. A request is small and
arrives at once: its size and its time are bounded.
"""

import asyncio
import contextlib
import http
import json
import logging
import os
import re
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from types import TracebackType
from typing import Any, Self

from common import rpc
from common.security import OPEN, TOKEN_REJECTED, Credentials

log = logging.getLogger(__name__)

DRAIN_PATH = "/admin/drain"
STATUS_PATH = "/admin/status"

_MAX_REQUEST_BYTES = 16 << 10
_REQUEST_SECONDS = 5.0
_POLL_SECONDS = 0.1
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,9})[ \t]*\r\n", re.I)
_METHODS = {DRAIN_PATH: "POST", STATUS_PATH: "GET"}


def admin_of_worker(
    address: str | None, drain: Callable[[], object], is_draining: Callable[[], bool], credentials: Credentials = OPEN
) -> AbstractContextManager[object]:
    """Return the admin listener of a worker of one process, as a context manager that needs a running event loop.

    Args:
        address: `--admin`; None: no listener.
        drain: Starts the orderly end, in the event loop; further calls have no effect.
        is_draining: Whether the worker is on its way to its end.
        credentials: What it demands of its callers; see `AdminServer`.

    Raises:
        OSError: The address cannot be bound.
    """
    if address is None:
        return contextlib.nullcontext()
    loop = asyncio.get_running_loop()

    def status() -> dict[str, Any]:
        return {"status": "draining" if is_draining() else "serving", "processes": [os.getpid()]}

    return AdminServer(address, lambda: loop.call_soon_threadsafe(drain), status, credentials)


class AdminServer:
    """Serves `POST /admin/drain` and `GET /admin/status` while it is entered, as a context manager.

    Args:
        address: `HOST:PORT`, `[IPV6]:PORT` or `unix:/PATH`. Only this user can connect to the socket file.
        drain: Starts the orderly end of the process. It is called in a thread, and again by each further request: it hands
            over to the event loop, as `lambda: loop.call_soon_threadsafe(begin)` does.
        credentials: Its token must be in each request's `Authorization`, if there is one. The listener has no TLS.
        status: Returns a JSON object with at least `status`, `serving` or `draining`. It is called in a thread.

    Raises:
        OSError: The address cannot be bound; the message names it and the option.
    """

    def __init__(
        self,
        address: str,
        drain: Callable[[], object],
        status: Callable[[], dict[str, Any]],
        credentials: Credentials = OPEN,
    ) -> None:
        rpc.ensure_free(address, "--admin")
        self._address = address
        try:
            self._server = _create_server(address, drain, status)
            self._server.credentials = credentials
        except OSError as error:
            reason = f"cannot listen on {address}: {error.strerror or error}; choose another --admin"
            raise OSError(reason) from None
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL_SECONDS,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        if self._address.startswith("unix:"):
            os.unlink(self._address.removeprefix("unix:"))


class _Server(socketserver.ThreadingTCPServer):
    # not http.server's: it resolves the name of its address, which can take long, and cannot listen on a path
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128
    drain: Callable[[], object]
    status: Callable[[], dict[str, Any]]
    credentials: Credentials = OPEN
    is_draining = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log that a client has disconnected, or what is wrong with a handler."""
        log.debug("an admin request failed", exc_info=True)


class _Server6(_Server):
    address_family = socket.AF_INET6


class _UnixServer(_Server):
    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        """Bind the path, for this user only."""
        path = str(self.server_address)
        self.socket.bind(path)
        os.chmod(path, 0o600)  # nobody can connect before the socket listens


def _create_server(address: str, drain: Callable[[], object], status: Callable[[], dict[str, Any]]) -> _Server:
    path = address.removeprefix("unix:")
    host, _, port = address.rpartition(":")
    server: _Server
    if path != address:
        server = _UnixServer(path, _Handler)  # type: ignore[arg-type]  # socketserver knows hosts and ports only
    else:
        server = (_Server6 if "[" in host else _Server)((host.strip("[]"), int(port)), _Handler)
    server.drain, server.status = drain, status
    return server


class _TooLargeError(Exception):
    """A request is larger than `_MAX_REQUEST_BYTES`."""


class _Handler(BaseHTTPRequestHandler):
    """One request, after which the connection is closed."""

    server: _Server

    def handle(self) -> None:
        """Read the whole request within bounds, and answer it."""
        try:
            self.rfile = BytesIO(_read_request(self.request))
        except TimeoutError:
            self._answer(408, {"error": f"The request did not arrive within {_REQUEST_SECONDS:g} s."})
        except _TooLargeError:
            self._answer(413, {"error": f"The request exceeds {_MAX_REQUEST_BYTES} bytes; the admin listener needs no body."})
        else:
            self.handle_one_request()

    def parse_request(self) -> bool:
        """Parse the head, and answer the request. Returns False: nothing is left to do for the base class."""
        if not super().parse_request():
            return False
        path = self.path.partition("?")[0]
        if (method := _METHODS.get(path)) is None:
            paths = " and ".join(f"{method} {known}" for known, method in _METHODS.items())
            self._answer(404, {"error": f"Path {path[:100]!r} does not exist: expected {paths}."})
        elif self.command != method:
            self._answer(405, {"error": f"Method {self.command[:20]} is not allowed: expected {method}."}, {"Allow": method})
        elif "Origin" in self.headers:  # a page in the operator's browser may send a POST to any address
            self._answer(403, {"error": "Requests of web pages (with the header Origin) are not allowed."})
        elif not self.server.credentials.accepts(self.headers.get("Authorization")):
            self._answer(401, {"error": f"{TOKEN_REJECTED[0].upper()}{TOKEN_REJECTED[1:]}."})
        elif method == "POST":
            self.server.drain()
            self.server.is_draining = True
            self._answer(202, {"status": "draining"})
        else:  # the event loop may not have begun yet
            self._answer(200, self.server.status() | ({"status": "draining"} if self.server.is_draining else {}))
        return False

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what cannot be parsed. The base class calls this method."""
        self._answer(code, {"error": message or http.HTTPStatus(code).phrase})

    def _answer(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        lines = {"Content-Type": "application/json", "Content-Length": len(data), "Connection": "close", **(headers or {})}
        head = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}", *(f"{name}: {value}" for name, value in lines.items())]
        self.wfile.write("\r\n".join([*head, "", ""]).encode() + data)


def _read_request(connection: socket.socket) -> bytes:
    """Return a whole request, or nothing if the client leaves. Raises `TimeoutError` or `_TooLargeError`."""
    deadline, data = time.monotonic() + _REQUEST_SECONDS, b""
    while len(data) < _length(data):
        connection.settimeout(max(deadline - time.monotonic(), 1e-3))
        chunk = connection.recv(4096)
        if not chunk:
            return b""  # the client has left: a part of a request must not drain anything
        data += chunk
        if len(data) > _MAX_REQUEST_BYTES or (b"\r\n\r\n" in data and _length(data) > _MAX_REQUEST_BYTES):
            raise _TooLargeError
    connection.settimeout(_REQUEST_SECONDS)
    return data


def _length(data: bytes) -> int:
    """Return the size of the request that begins with `data`; one byte more than there are if its head is incomplete."""
    head, end, _ = data.partition(b"\r\n\r\n")
    if not end:
        return len(data) + 1
    length = _CONTENT_LENGTH.search(head + b"\r\n")
    return len(head) + len(end) + (int(length[1]) if length else 0)

"""The admin listener of a process (`--admin`): plain HTTP that drains it, at an address that no client of the service reaches.

It answers while the event loop is busy: `common/small_http.py` runs it in threads, and bounds what strangers may send.
"""

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

from common import rpc, small_http
from common.security import OPEN, TOKEN_REJECTED, Credentials

DRAIN_PATH = "/admin/drain"
STATUS_PATH = "/admin/status"

_POLL_SECONDS = 0.1
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


class _Server(small_http.Server):
    drain: Callable[[], object]
    status: Callable[[], dict[str, Any]]
    credentials: Credentials = OPEN
    is_draining = False


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
        server = _UnixServer(path, _Handler)
    else:
        server = (_Server6 if "[" in host else _Server)((host.strip("[]"), int(port)), _Handler)
    server.drain, server.status = drain, status
    return server


class _Handler(small_http.RequestHandler):
    server: _Server

    def respond(self) -> None:
        """Drain the process, or report its status."""
        path = self.path.partition("?")[0]
        if (method := _METHODS.get(path)) is None:
            paths = " and ".join(f"{method} {known}" for known, method in _METHODS.items())
            self.answer_error(404, f"Path {path[:100]!r} does not exist: expected {paths}.")
        elif self.command != method:
            self.answer_error(405, f"Method {self.command[:20]} is not allowed: expected {method}.", {"Allow": method})
        elif "Origin" in self.headers:  # a page in the operator's browser may send a POST to any address
            self.answer_error(403, "Requests of web pages (with the header Origin) are not allowed.")
        elif not self.server.credentials.accepts(self.headers.get("Authorization")):
            self.answer_error(401, f"{TOKEN_REJECTED[0].upper()}{TOKEN_REJECTED[1:]}.")
        elif method == "POST":
            self.server.drain()
            self.server.is_draining = True
            self.answer_json(202, {"status": "draining"})
        else:  # the event loop may not have begun yet
            self.answer_json(200, self.server.status() | ({"status": "draining"} if self.server.is_draining else {}))

"""A small HTTP server for operators: the admin listener and the metrics of a worker.

It runs in threads of its own, so it answers while the event loop is busy, and it needs no library. Strangers may reach it, so
everything is bounded: the number of requests at a time, their size, and their time.
"""

import http
import json
import logging
import re
import socket
import socketserver
import threading
import time
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from typing import Any

log = logging.getLogger(__name__)

MAX_REQUESTS = 16
"""Maximum number of connections at a time, each of which takes a thread."""
_MAX_REQUEST_BYTES = 16 << 10
_REQUEST_SECONDS = 5.0
"""Time for a request to arrive, and again for its response to be read."""
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,9})[ \t]*\r\n", re.I)


class Server(socketserver.ThreadingTCPServer):
    """Serves requests in at most `MAX_REQUESTS` threads.

    Beyond that, the connection is closed that has waited longest for its client to send a request; if none waits, the one
    that has been answered for the longest time.
    """

    # not http.server's: it resolves the name of its address, which can take long, and cannot listen on a path
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, *args: Any, **options: Any) -> None:
        self._slots = threading.Semaphore(MAX_REQUESTS)
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, bool] = {}  # the oldest first; whether its request has arrived
        super().__init__(*args, **options)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread, in place of another one if there are too many."""
        if not self._slots.acquire(blocking=False):
            self._close_one()
            self._slots.acquire()
        with self._lock:
            self._connections[request] = False
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # the system has no thread left
            self._remove(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection, and make room for another one."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._remove(request)

    def set_arrived(self, request: socket.socket) -> None:
        """Keep a connection from now on as long as others wait for their clients: its request has arrived."""
        with self._lock:
            if request in self._connections:
                self._connections[request] = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log that a client has disconnected, or what is wrong with a handler."""
        log.debug("a request failed", exc_info=True)

    def _close_one(self) -> None:
        with self._lock:
            waiting = (connection for connection, has_arrived in self._connections.items() if not has_arrived)
            connection = next(waiting, None) or next(iter(self._connections), None)
            if connection is not None:
                _shut_down(connection)  # its thread ends at once, and closes it

    def _remove(self, request: socket.socket) -> None:
        with self._lock:
            del self._connections[request]
        self._slots.release()


def _shut_down(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # its client has left
        log.debug("a client has left", exc_info=True)


class _TooLargeError(Exception):
    """A request is larger than `_MAX_REQUEST_BYTES`."""


class RequestHandler(BaseHTTPRequestHandler):
    """One request, after which the connection is closed. Subclasses implement `respond`."""

    server: Server

    def respond(self) -> None:
        """Answer the request, whose head is in `command`, `path` and `headers`."""
        raise NotImplementedError

    def handle(self) -> None:
        """Read the whole request within bounds, and answer it."""
        try:
            self.rfile = BytesIO(_read_request(self.request))
        except TimeoutError:
            self.answer_error(408, f"The request did not arrive within {_REQUEST_SECONDS:g} s.")
        except _TooLargeError:
            self.answer_error(413, f"The request exceeds {_MAX_REQUEST_BYTES} bytes; no body is needed here.")
        else:
            self.server.set_arrived(self.request)
            self.handle_one_request()

    def parse_request(self) -> bool:
        """Parse the head, and answer the request. Returns False: nothing is left to do for the base class."""
        if super().parse_request():
            self.respond()
        return False

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what cannot be parsed. The base class calls this method."""
        self.answer_error(code, message or http.HTTPStatus(code).phrase)

    def answer_error(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        """Answer with an error in JSON."""
        self.answer_json(status, {"error": message}, headers)

    def answer_json(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        """Answer with a JSON object."""
        self.answer(status, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})})

    def answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        """Answer, and end the connection."""
        headers = {**headers, "Content-Length": str(len(data)), "Connection": "close"}
        head = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}", *(f"{name}: {value}" for name, value in headers.items())]
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

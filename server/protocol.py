"""HTTP/1.1 as callers speak it: uvicorn's faster parser, which bounds no head and answers what is no HTTP in plain text."""

import json
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from wire import errors

MAX_HEAD = 64 << 10
"""Bytes of a request's line and headers."""


def served(app: Callable[..., Any], grace: int, **more: Any) -> uvicorn.Config:
    """How the gateway's application is served. `grace`: seconds that answers have to end after a signal."""
    return uvicorn.Config(
        app, http=Protocol, ws="none", log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=grace,
        **more,
    )  # fmt: skip


class Protocol(HttpToolsProtocol):
    """Answers 431 to a head that is too large, 400 to what is no HTTP, in OpenAI's shape, and hangs up."""

    _head = 0  # bytes of the head that is coming
    _in_head = False

    def data_received(self, data: bytes) -> None:
        already = self._in_head
        super().data_received(data)
        # the parser keeps a field until it is whole, and says nothing of it: so whole chunks are counted, too
        if already and self._in_head:
            self._head += len(data)
            if self._head > MAX_HEAD and not self.transport.is_closing():
                self.send_400_response("")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head, self._in_head = 0, True

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if self._head > MAX_HEAD:
            raise ValueError("too large a head")  # the parser makes a parser's error of it, which ends in the next method
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's name: for whatever its parser refuses. `msg` is in nobody's words."""
        error = errors.InvalidRequest("this is no HTTP/1.1 request: is it TLS, or a proxy's header, on a plain port?")
        if self._head > MAX_HEAD:
            error = errors.HeadTooLarge(f"the request's line and headers have more than {MAX_HEAD} bytes: send less in them")
        body = json.dumps(error.body()).encode()
        head = [
            f"HTTP/1.1 {error.status.value} {error.status.phrase}", "Content-Type: application/json",
            f"Content-Length: {len(body)}", "Connection: close", "", "",
        ]  # fmt: skip
        if self.cycle is None or self.cycle.response_complete:  # else an answer is on its way, and this would be in its middle
            self.transport.write("\r\n".join(head).encode() + body)
        self.transport.close()

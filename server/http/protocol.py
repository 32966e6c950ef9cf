"""HTTP/1.1 as callers speak it: uvicorn's faster parser, which bounds no head and answers what is no HTTP in plain text."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from common import errors

MAX_HEAD = 64 << 10
"""Bytes of a request's line and headers."""
STALL = 60.0
"""Seconds in which a caller has to take some of what waits for it: else it would hold a place for ever, without a word."""


def served(app: Callable[..., Any], grace: int, **more: Any) -> uvicorn.Config:
    """How the gateway's application is served. `grace`: seconds that answers have to end after a signal."""
    return uvicorn.Config(
        app, http=Protocol, ws="none", log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=grace,
        **more,
    )  # fmt: skip


class Protocol(HttpToolsProtocol):
    """Answers 431 to a head that is too large, 400 to what is no HTTP, in OpenAI's shape, and hangs up.

    Hangs up on a caller that reads nothing of its answer. Trailers are read over, and have to end as a head has.
    """

    _head = 0  # bytes of the head that is coming, or of what comes after a body
    _in_head = False
    _told = False
    _stalled: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        self._told = False
        super().data_received(data)
        # the parser keeps a field until it is whole, and says nothing of it: so chunks that it says nothing of are counted, too
        if not self._told:
            self._head += len(data)
            if self._head > MAX_HEAD and not self.transport.is_closing():
                self.send_400_response("")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head, self._in_head, self._told = 0, True, True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._told = False, True
        self._head = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if self._head > MAX_HEAD:
            raise ValueError("too large a head")  # the parser makes a parser's error of it, which ends in the next method
        super().on_headers_complete()
        self._head = 0

    def on_body(self, body: bytes) -> None:
        self._head, self._told = 0, True
        super().on_body(body)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(STALL, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget_stall()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_stall()
        super().connection_lost(exc)

    def _forget_stall(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

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

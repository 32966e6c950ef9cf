"""HTTP/1.1 with bounds: uvicorn's httptools protocol neither bounds a request's head nor answers invalid HTTP in JSON.

This module subclasses uvicorn's internals: pyproject.toml bounds its version.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from common import errors

MAX_HEAD_BYTES = 64 << 10
"""Maximum size of a request line with its headers."""
STALL_TIMEOUT_SECONDS = 60.0
"""Time in which a caller must read some of a response that waits for it; else it would hold its permit for ever."""


def uvicorn_config(app: Callable[..., Any], shutdown_timeout: int, **options: Any) -> uvicorn.Config:
    """Return uvicorn's configuration for the gateway.

    Args:
        app: The ASGI application, or its factory.
        shutdown_timeout: Seconds that responses have to end after a signal.
        **options: Further options of `uvicorn.Config`.
    """
    return uvicorn.Config(
        app,
        http=BoundedHttpProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=shutdown_timeout,
        **options,
    )


class BoundedHttpProtocol(HttpToolsProtocol):
    """Answers 431 to a head that is too large and 400 to invalid HTTP, with OpenAI's error object, and closes the connection.

    It disconnects a caller that does not read its response. Trailers are ignored and bounded like a head.
    """

    _head_bytes = 0  # of the head that is being received, or of trailers after a body
    _in_head = False
    _parser_called_back = False
    _stall_timer: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        """Count the bytes of heads and trailers."""
        self._parser_called_back = False
        super().data_received(data)
        # the parser buffers a field until it is complete, without a callback: so chunks without a callback are counted
        if not self._parser_called_back:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("")

    def on_message_begin(self) -> None:
        """Start counting a head."""
        super().on_message_begin()
        self._head_bytes, self._in_head, self._parser_called_back = 0, True, True

    def on_header(self, name: bytes, value: bytes) -> None:
        """Ignore trailers."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Check the size of the head."""
        self._in_head, self._parser_called_back = False, True
        self._head_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if self._head_bytes > MAX_HEAD_BYTES:
            raise ValueError("head too large")  # the parser turns it into its own error, which ends in send_400_response
        super().on_headers_complete()
        self._head_bytes = 0

    def on_body(self, body: bytes) -> None:
        """Reset the count: a body is bounded elsewhere."""
        self._head_bytes, self._parser_called_back = 0, True
        super().on_body(body)

    def pause_writing(self) -> None:
        """Start the timer of a caller that does not read."""
        super().pause_writing()
        self._stall_timer = self.loop.call_later(STALL_TIMEOUT_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the timer."""
        super().resume_writing()
        self._cancel_stall_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._cancel_stall_timer()
        super().connection_lost(exc)

    def _cancel_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def send_400_response(self, msg: str) -> None:
        """Answer a request that the parser rejects. uvicorn calls this method; its `msg` is not used."""
        error = errors.InvalidRequest("Not a valid HTTP/1.1 request: is it TLS, or a PROXY header, on a plain HTTP port?")
        if self._head_bytes > MAX_HEAD_BYTES:
            error = errors.HeadTooLarge(
                f"The request line and headers exceed {MAX_HEAD_BYTES} bytes: send fewer or smaller headers."
            )
        body = json.dumps(error.body()).encode()
        head = [
            f"HTTP/1.1 {error.status.value} {error.status.phrase}", "Content-Type: application/json",
            f"Content-Length: {len(body)}", "Connection: close", "", "",
        ]  # fmt: skip
        if self.cycle is None or self.cycle.response_complete:  # else this would land inside a response
            self.transport.write("\r\n".join(head).encode() + body)
        self.transport.close()

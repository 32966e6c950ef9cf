"""HTTP/1.1 with bounds: uvicorn's httptools protocol neither bounds a request's head nor answers invalid HTTP in JSON.

It also loses the body of a request that offers an upgrade, and sends chunks to HTTP/1.0 clients, which do not know them. This
module subclasses uvicorn's internals: pyproject.toml bounds its version.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from common import errors

MAX_HEAD_BYTES = 64 << 10
"""Maximum size of a request line with its headers."""
_UPGRADE_HEADERS = (b"connection", b"upgrade", b"http2-settings")
STALL_TIMEOUT_SECONDS = 60.0
"""Time in which a caller must read some of a response that waits for it; else it would hold its permit for ever."""


def uvicorn_config(
    app: Callable[..., Any], shutdown_timeout: int, trusted_proxies: Sequence[str] = (), **options: Any
) -> uvicorn.Config:
    """Return uvicorn's configuration for the gateway.

    Args:
        app: The ASGI application, or its factory.
        shutdown_timeout: Seconds that responses have to end after a signal.
        trusted_proxies: Addresses and networks whose `X-Forwarded-For` names the caller. uvicorn's own default trusts this
            machine, and so every caller behind a proxy on it.
        **options: Further options of `uvicorn.Config`.
    """
    return uvicorn.Config(
        app,
        http=BoundedHttpProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(trusted_proxies),
        forwarded_allow_ips=list(trusted_proxies),
        timeout_graceful_shutdown=shutdown_timeout,
        **options,
    )


class BoundedHttpProtocol(HttpToolsProtocol):
    """Answers 431 to a head that is too large and 400 to invalid HTTP, with OpenAI's error object, and closes the connection.

    It disconnects a caller that does not read its response. Trailers are ignored and bounded like a head. An offer to upgrade
    the connection (WebSocket, or HTTP/2 as Java's client sends it) is ignored, and the request answered. A response without a
    length ends with the connection for an HTTP/1.0 client.
    """

    _head_bytes = 0  # of the head that is being received, or of trailers after a body
    _in_head = False
    _parser_called_back = False
    _stall_timer: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        """Count the bytes of heads and trailers."""
        self._parser_called_back, size = False, len(data)
        self._unset_keepalive_if_required()
        try:
            while data:
                data = self._feed(data)
        except httptools.HttpParserError:
            self.send_400_response("")
            return
        # the parser buffers a field until it is complete, without a callback: so chunks without a callback are counted
        if not self._parser_called_back:
            self._head_bytes += size
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
        if not self._offers_upgrade():
            super().on_headers_complete()
        self._head_bytes = 0

    def on_body(self, body: bytes) -> None:
        """Reset the count: a body is bounded elsewhere."""
        self._head_bytes, self._parser_called_back = 0, True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request, unless it offers an upgrade: then it has not begun yet."""
        if not self._offers_upgrade():
            super().on_message_complete()

    def _offers_upgrade(self) -> bool:
        # CONNECT counts as an upgrade too, but it cannot be parsed without one
        return bool(self.parser.should_upgrade()) and self.parser.get_method() != b"CONNECT"

    def _feed(self, data: bytes) -> bytes:
        """Parse data. Returns what has to be parsed next: all of it from an offer of an upgrade on, but without the offer.

        The parser takes what follows such an offer for another protocol.
        """
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            return self._head_without_upgrade() + data[upgrade.args[0] :] if self._offers_upgrade() else b""
        return b""

    def _head_without_upgrade(self) -> bytes:
        """Return the head that was parsed last without its offer of an upgrade, and start a new parser for it."""
        tokens = [token for name, value in self.headers if name == b"connection" for token in value.lower().split(b",")]
        kept = [token for token in map(bytes.strip, tokens) if token not in _UPGRADE_HEADERS]
        headers = [(name, value) for name, value in self.headers if name not in _UPGRADE_HEADERS]
        headers += [(b"connection", b", ".join(kept))] if kept else []
        first_line = self.parser.get_method() + b" " + self.url + b" HTTP/" + self.parser.get_http_version().encode()
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # like uvicorn's own
        return b"\r\n".join([first_line, *(name + b": " + value for name, value in headers), b"", b""])

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        super()._start_asgi_task(cycle, _ending_with_connection(cycle, app) if cycle.scope["http_version"] == "1.0" else app)

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


def _ending_with_connection(cycle: RequestResponseCycle, app: Any) -> Any:
    """Return an application whose responses without a length end with the connection, instead of being sent in chunks."""

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        without_length = False

        async def send_without_chunks(message: Any) -> None:
            nonlocal without_length
            if message["type"] == "http.response.start":
                without_length = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
                if without_length:
                    cycle.chunked_encoding = False
            elif without_length:
                cycle.expected_content_length += len(message.get("body", b""))  # uvicorn would reject more than it expects
            await send(message)

        await app(scope, receive, send_without_chunks)

    return serve

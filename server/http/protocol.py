"""HTTP/1.1 with bounds on heads and on time, and with errors in JSON. uvicorn's httptools protocol has none of them.

It also loses the body of a request that offers an upgrade, and sends chunks to HTTP/1.0 clients, which do not know them. This
module subclasses uvicorn's internals: pyproject.toml bounds its version.
"""

import asyncio
import functools
import json
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from common import errors, logs
from server.http.connections import Connections

MAX_HEAD_BYTES = 64 << 10
"""Maximum size of a request line with its headers."""
_UPGRADE_HEADERS = (b"connection", b"upgrade", b"http2-settings")
STALL_TIMEOUT_SECONDS = 60.0
"""Time in which a caller must read some of a response that waits for it; else it would hold its permit for ever."""
MIN_READ_RATE = 1024
"""Bytes per second that it must read in this time."""
_LINGER_SECONDS = 1.0
"""Time for which data of a refused caller is discarded: a connection closed at once may be reset before it has the error."""


def uvicorn_config(
    app: Callable[..., Any],
    shutdown_timeout: int,
    connections: Connections,
    trusted_proxies: Sequence[str] = (),
    **options: Any,
) -> uvicorn.Config:
    """Return uvicorn's configuration for the gateway.

    Args:
        app: The ASGI application, or its factory.
        shutdown_timeout: Seconds that responses have to end after a signal.
        connections: The connections of this process.
        trusted_proxies: Addresses and networks whose `X-Forwarded-For` names the caller. uvicorn's own default trusts this
            machine, and so every caller behind a proxy on it.
        **options: Further options of `uvicorn.Config`.
    """
    protocol: Any = functools.partial(BoundedHttpProtocol, connections)
    return uvicorn.Config(
        app,
        http=protocol,
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
    """Answers 431 to a head that is too large, 408 to one that is too slow and 400 to invalid HTTP, and closes the connection.

    The errors are OpenAI's error objects. A caller that does not read its response is disconnected. Trailers are ignored and
    bounded like a head. An offer to upgrade the connection (WebSocket, or HTTP/2 as Java's client sends it) is ignored, and the
    request answered. A response without a length ends with the connection for an HTTP/1.0 client.
    """

    headers: list[tuple[bytes, bytes]]
    waiting_since = 0.0
    _head_bytes = 0  # of the head that is being received, or of trailers after a body
    _in_head = False
    _is_refused = False
    _parser_called_back = False
    _unsent_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _cancel_handshake: Callable[[], object]

    def __init__(self, connections: Connections, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._connections = connections
        self.headers = []

    @property
    def is_waiting_for_request(self) -> bool:
        """Whether the caller has not sent a complete request."""
        return not self.pipeline and (self._is_idle or self.cycle.more_body)

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def start_handshake(self, cancel: Callable[[], object]) -> None:
        """Start to wait for the end of a TLS handshake, which `cancel` ends: until then there is no transport."""
        self._cancel_handshake, self.waiting_since = cancel, self.loop.time()

    def give_way(self) -> None:
        """Close the connection at once."""
        if self.transport is None:
            self._cancel_handshake()
        else:
            self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer of the first head, or refuse the connection."""
        super().connection_made(transport)
        self.waiting_since = self.loop.time()
        self._start_head_timer()
        if not self._connections.add(self):
            self._send_error(errors.Unavailable("Server is at capacity (--max-connections). Retry after 1 s.", retry_after=1))

    def data_received(self, data: bytes) -> None:
        """Count the bytes of heads and trailers."""
        if self._is_refused:
            return
        self._parser_called_back, size = False, len(data)
        self._unset_keepalive_if_required()
        if self._is_idle:  # also for line feeds before a head, about which the parser says nothing
            self._start_head_timer()
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
        self._start_head_timer()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Ignore trailers."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Check the size of the head."""
        self._in_head, self._parser_called_back = False, True
        self._cancel_head_timer()
        self.waiting_since = self.loop.time()
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
        if self._offers_upgrade():
            return
        super().on_message_complete()
        if self._is_idle:  # it was answered before its end: from here on the connection is kept for another one
            self._cancel_head_timer()
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

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

    def on_response_complete(self) -> None:
        """Wait for the next request, for the rest of this one, or for the caller to read the response."""
        is_incomplete = self.cycle.more_body and not self.pipeline
        super().on_response_complete()
        self.waiting_since = self.loop.time()
        if is_incomplete:
            self._start_head_timer()
        if self.transport.get_write_buffer_size():
            self._start_stall_timer()

    def pause_writing(self) -> None:
        """Start the timer of a caller that does not read."""
        super().pause_writing()
        self._start_stall_timer()

    def resume_writing(self) -> None:
        """Stop the timer."""
        super().resume_writing()
        self._cancel_stall_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._connections.remove(self)
        self._cancel_head_timer()
        self._cancel_stall_timer()
        super().connection_lost(exc)

    def _start_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self._connections.head_timeout, self._on_head_timeout)

    def _cancel_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _on_head_timeout(self) -> None:
        self._head_timer = None
        if not self._is_idle:  # a response is on its way: the connection ends after it
            self.cycle.keep_alive = False
        elif self._in_head:
            seconds = self._connections.head_timeout
            self._send_error(
                errors.RequestTooSlow(f"The request line and headers did not arrive within {seconds:g} s (--head-timeout).")
            )
        else:
            self.transport.close()

    def _start_stall_timer(self) -> None:
        if self._stall_timer is None:
            self._unsent_bytes = self.transport.get_write_buffer_size()
            self._stall_timer = self.loop.call_later(STALL_TIMEOUT_SECONDS, self._check_progress)

    def _check_progress(self) -> None:
        """Disconnect a caller that has read too little since the timer was started."""
        self._stall_timer = None
        unsent = self.transport.get_write_buffer_size()
        if unsent and self._unsent_bytes - unsent < STALL_TIMEOUT_SECONDS * MIN_READ_RATE:
            self.transport.abort()
        elif unsent:
            self._start_stall_timer()

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
        self._send_error(error)

    def _send_error(self, error: errors.DvdError) -> None:
        """Answer without the application, and end the connection."""
        self._is_refused = True
        self._cancel_head_timer()
        if not self._is_idle:  # this would land inside a response
            self.transport.close()
            return
        request_id, body = self._request_id(), json.dumps(error.body()).encode()
        head = [
            f"HTTP/1.1 {error.status.value} {error.status.phrase}", "Content-Type: application/json",
            f"Content-Length: {len(body)}", f"X-Request-Id: {request_id}", "Connection: close",
            *([f"Retry-After: {error.retry_after:g}"] if error.retry_after else []), "", "",
        ]  # fmt: skip
        self.transport.write("\r\n".join(head).encode() + body)
        if self.transport.can_write_eof():  # one with TLS cannot
            self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.transport.abort)
        self._connections.record_error(request_id, error.code, error.status.value)

    def _request_id(self) -> str:
        """Return the caller's `X-Request-Id` if it has arrived and is valid, else a new one."""
        values = [value.decode("latin-1") for name, value in self.headers if name == logs.REQUEST_ID_KEY.encode()]
        return values[0] if values and logs.is_valid_request_id(values[0]) else uuid.uuid4().hex


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

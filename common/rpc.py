"""gRPC channels and servers with this system's settings, and the translation between gRPC's errors and `common.errors`."""

from __future__ import annotations  # grpc.aio is generic for type checkers only

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeVar

import grpc
import grpc.aio

from common import errors
from common.descriptors import connection_limit
from common.security import HEADER, OPEN, TOKEN_REJECTED, Credentials, TlsClock, TlsFiles

T = TypeVar("T")

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
"""Chunk size of a stream: large enough to amortise Python's cost per message, small enough not to block the event loop."""

_MAX_MESSAGE_BYTES = 256 << 20
_OLD_CHANNEL_SECONDS = 600.0
"""Time for calls on a channel whose certificate has been replaced."""
_ERROR_CODE_KEY = "dvd-error-code"
_ERROR_PARAM_KEY = "dvd-error-param"
_OPTIONS = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # this one ends the connection; its default is a minute
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    # reconnect within a second to a worker that restarts, not within gRPC's default of two minutes
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.client_idle_timeout_ms", 60_000),  # before a server ends the connection, of which gRPC's library writes a line
    ("grpc.enable_http_proxy", 0),
    ("grpc.so_reuseport", 0),
]

# what strangers may hold who reach the port: connections that do not finish their handshake, do nothing, or open many streams
_MAX_CONNECTIONS = 1024
_SERVER_OPTIONS = {
    "grpc.server_handshake_timeout_ms": 10_000,
    "grpc.max_connection_idle_ms": 300_000,
    "grpc.max_concurrent_streams": 4096,
}

_ERROR_BY_STATUS = {
    grpc.StatusCode.CANCELLED: errors.WorkerUnavailable,  # by a stopping server; ours raises CancelledError
    grpc.StatusCode.UNAVAILABLE: errors.WorkerUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
}


def open_channel(address: str, credentials: Credentials = OPEN) -> grpc.aio.Channel:
    """Return a channel to `HOST:PORT` or `unix:/PATH`. Keep it open: it reconnects by itself.

    Its calls need the metadata of `credentials` besides. Raises: `OSError` if a file of TLS cannot be read.
    """
    tls = credentials.tls
    if tls is None or address.startswith("unix:"):
        return grpc.aio.insecure_channel(address, options=_OPTIONS)
    key, cert, authorities = tls.read()
    name = [("grpc.ssl_target_name_override", tls.name)] if tls.name else []
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(authorities, key, cert), options=[*_OPTIONS, *name])


class Connection:
    """A channel that is opened anew once the files of TLS are replaced; calls on the old one end first."""

    def __init__(self, address: str, credentials: Credentials = OPEN) -> None:
        self._address, self._credentials = address, credentials
        self._clock = TlsClock(None if address.startswith("unix:") else credentials.tls)
        self._channel = open_channel(address, credentials)
        self._stub: Any = None  # of `_stub_channel`
        self._stub_channel: grpc.aio.Channel | None = None
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def channel(self) -> grpc.aio.Channel:
        """The channel for the next call."""
        if self._clock.has_changed():
            try:
                new = open_channel(self._address, self._credentials)
            except OSError as error:
                log.warning("the new TLS files cannot be read: %s", error.strerror)
            else:
                self._closing.add(task := asyncio.create_task(self._channel.close(_OLD_CHANNEL_SECONDS)))
                task.add_done_callback(self._closing.discard)
                self._channel = new
        return self._channel

    def stub(self, create: Callable[[grpc.aio.Channel], T]) -> T:
        """Return the stub for the next call. It is kept, since to create one takes a fifth as long as a short call.

        `create` is the class of the stub, the same one each time.
        """
        channel = self.channel
        if channel is not self._stub_channel:
            self._stub, self._stub_channel = create(channel), channel
        stub: T = self._stub
        return stub

    async def close(self) -> None:
        """Close all channels at once."""
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        await self._channel.close()


def create_server(
    *addresses: str,
    credentials: Credentials = OPEN,
    max_message_bytes: int = _MAX_MESSAGE_BYTES,
    on_refused: Callable[[], object] = int,
) -> grpc.aio.Server:
    """Return a server bound to each address, not started.

    Args:
        addresses: `HOST:PORT` or `unix:/PATH`.
        credentials: what it demands of its callers. On a Unix socket that is the token only.
        max_message_bytes: largest message that it receives.
        on_refused: called for each call that is refused for its token.

    Raises:
        OSError: an address cannot be bound; the message names it.
    """
    own = {
        **_SERVER_OPTIONS,
        "grpc.max_allowed_incoming_connections": connection_limit(_MAX_CONNECTIONS),
        "grpc.max_receive_message_length": max_message_bytes,
    }
    options = list((dict(_OPTIONS) | own).items())
    server = grpc.aio.server(interceptors=[_GuardInterceptor(credentials, on_refused)], options=options)
    for address in addresses:
        ensure_free(address)
        try:
            if credentials.tls is None or address.startswith("unix:"):
                server.add_insecure_port(address)
            else:
                server.add_secure_port(address, _server_credentials(credentials.tls))
        except RuntimeError:
            raise OSError(f"cannot listen on {address}") from None
    return server


def _server_credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    """Demand a certificate of each client. The files are read again when they are replaced."""

    def configuration() -> Any:
        key, cert, authorities = tls.read()
        return grpc.ssl_server_certificate_configuration([(key, cert)], authorities)

    clock = TlsClock(tls)

    def fetch() -> Any:
        try:
            return configuration() if clock.has_changed() else None
        except OSError as error:
            log.warning("the new TLS files cannot be read: %s", error.strerror)
            return None

    return grpc.dynamic_ssl_server_credentials(configuration(), fetch, require_client_authentication=True)


def ensure_free(address: str, option: str = "address") -> None:
    """Check that no process listens at an address, and remove the socket file that a killed process left there.

    Args:
        address: address to listen on.
        option: the flag that sets it, for the message.

    Raises:
        OSError: a process listens there, or the address is not one of this machine.
    """
    in_use = OSError(f"cannot listen on {address}: it is in use by another process; choose another {option}")
    path = address.removeprefix("unix:")
    if path == address:
        host, _, port = address.rpartition(":")
        with socket.socket(socket.AF_INET6 if "[" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host.strip("[]"), int(port)))
            except OSError as error:
                raise in_use if error.errno == errno.EADDRINUSE else OSError(f"cannot listen on {address}: {error}") from None
    elif os.path.exists(path):
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(ConnectionRefusedError):
            probe.connect(path)
            raise in_use
        os.unlink(path)


@contextlib.contextmanager
def translate_errors(peer: str, quiet: bool = False) -> Iterator[None]:
    """Raise the `DvdError` for a gRPC error in the block.

    Args:
        peer: name of the other side for the message, such as "vision worker".
        quiet: log the gRPC error at debug level instead of as a warning.
    """
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise _translated(error, peer, quiet) from None


def require_message(reply: T | None, peer: str) -> T:
    """Return a reply. Raises `WorkerUnavailable` if it is None, which gRPC returns for bytes that are no message."""
    if reply is None:
        raise errors.WorkerUnavailable(f"the {peer}'s reply cannot be decoded; try again")
    return reply


def _translated(error: grpc.aio.AioRpcError, peer: str, quiet: bool) -> errors.DvdError:
    trailers = dict(error.trailing_metadata() or ())
    cls = errors.error_class(str(trailers.get(_ERROR_CODE_KEY, "")))
    if cls is not None:
        return cls(error.details() or cls.code, param=str(trailers.get(_ERROR_PARAM_KEY, "")) or None)
    # grpc.aio raises this when it writes to a call that has just ended: the peer is gone
    peer_lost = error.code() is grpc.StatusCode.INTERNAL and error.details() == "Internal error from Core"
    cls = errors.WorkerUnavailable if peer_lost else _ERROR_BY_STATUS.get(error.code(), errors.InternalError)
    # gRPC's details contain addresses and paths, which callers must not see: log them, and raise a generic message
    log.log(logging.DEBUG if quiet else logging.WARNING, "%s failed: %s: %s", peer, error.code().name, error.details())
    return cls(f"the {peer} did not answer ({error.code().name.lower()}); try again")


class _GuardInterceptor(grpc.aio.ServerInterceptor):
    """Demands the cluster token, and maps errors of a servicer to gRPC statuses.

    Unexpected errors are logged here; the caller sees no traceback.
    """

    def __init__(self, credentials: Credentials, on_refused: Callable[[], object]) -> None:
        self._credentials, self._on_refused = credentials, on_refused

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the method's handler with its errors mapped, or one that refuses the call before any message is received."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        metadata: Any = handler_call_details.invocation_metadata
        if not self._credentials.accepts(dict(metadata or ()).get(HEADER)):
            self._on_refused()
            return grpc.stream_unary_rpc_method_handler(_refuse)
        if handler.response_streaming:
            raise NotImplementedError("methods with streaming responses are not supported")
        behaviour = handler.stream_unary if handler.request_streaming else handler.unary_unary
        wrap = grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler

        # gRPC itself answers INTERNAL, with a traceback in the log, where a message cannot be parsed
        parse = None if handler.request_streaming else handler.request_deserializer

        async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            async with _abort_on_error(context):
                return await behaviour(_parsed(request, parse) if parse else request, context)

        return wrap(
            guarded,
            request_deserializer=None if parse else handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


async def _refuse(_messages: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    async with _abort_on_error(context):
        raise errors.Unauthorized(TOKEN_REJECTED)


def _parsed(message: bytes, parse: Callable[[bytes], Any]) -> Any:
    """Return a parsed request. Raises: `InvalidRequest` if it is not one."""
    try:
        return parse(message)
    except Exception as error:
        raise errors.InvalidRequest(
            f"invalid message: {type(error).__name__}; expected the protobuf message of the method"
        ) from None


@contextlib.asynccontextmanager
async def _abort_on_error(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    try:
        yield
    except errors.DvdError as error:
        param = ((_ERROR_PARAM_KEY, error.param),) if error.param else ()
        context.set_trailing_metadata(((_ERROR_CODE_KEY, error.code), *param))
        await context.abort(grpc.StatusCode[error.grpc_code.name], str(error))
    except (grpc.aio.AbortError, grpc.aio.BaseError):
        raise
    except Exception:
        log.exception("unexpected error in a service method")
        await context.abort(grpc.StatusCode.INTERNAL, "internal error; see this worker's log")

"""gRPC channels and servers as this system wants them, and the one place where gRPC's errors are renamed."""

from __future__ import annotations  # grpc.aio is generic for type checkers only

import contextlib
import errno
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
import grpc.aio

from common import errors

log = logging.getLogger(__name__)

CHUNK = 1 << 20
"""Bytes of one chunk of a stream: large enough to amortise Python's cost a message, small enough to keep loops responsive."""

MAX_MESSAGE = 256 << 20
_CODE_KEY = "dvd-error-code"
_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    # a worker that restarts must be found again in a second, not after gRPC's default two minutes
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_http_proxy", 0),
    ("grpc.so_reuseport", 0),
]

_FALLBACK = {
    grpc.StatusCode.CANCELLED: errors.WorkerUnavailable,  # by the other side, as it stops: our own leaving is no error here
    grpc.StatusCode.UNAVAILABLE: errors.WorkerUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
}


def open_channel(address: str) -> grpc.aio.Channel:
    """One long-lived channel to `host:port` or `unix:/path`."""
    return grpc.aio.insecure_channel(address, options=_OPTIONS)


def create_server(*addresses: str) -> grpc.aio.Server:
    """A server bound to each address, not started. Raises `OSError` naming an address that cannot be bound."""
    made = grpc.aio.server(interceptors=[_ErrorInterceptor()], options=_OPTIONS)
    for address in addresses:
        ensure_free(address)
        try:
            made.add_insecure_port(address)
        except RuntimeError:
            raise OSError(f"cannot listen on {address}") from None
    return made


def ensure_free(address: str) -> None:
    """See that nobody listens at an address, and remove the file that a killed process left there. Raises `OSError`."""
    taken = OSError(f"cannot listen on {address}: another process does; choose another address")
    path = address.removeprefix("unix:")
    if path == address:
        host, _, port = address.rpartition(":")
        with socket.socket(socket.AF_INET6 if "[" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host.strip("[]"), int(port)))
            except OSError as error:
                raise taken if error.errno == errno.EADDRINUSE else OSError(f"cannot listen on {address}: {error}") from None
    elif os.path.exists(path):
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(ConnectionRefusedError):
            probe.connect(path)
            raise taken
        os.unlink(path)


@contextlib.contextmanager
def translate_errors(peer: str, quiet: bool = False) -> Iterator[None]:
    """Raise our own errors for gRPC's. `peer` names the other side in the message ("vision worker"); `quiet`: not logged."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise _ours(error, peer, quiet) from None


def _ours(error: grpc.aio.AioRpcError, peer: str, quiet: bool) -> errors.DvdError:
    trailers = dict(error.trailing_metadata() or ())
    known = errors.error_class(str(trailers.get(_CODE_KEY, "")))
    if known is not None:
        return known(error.details() or known.code)
    # what grpc.aio says of writing to a call that has just ended: the other side is gone
    lost = error.code() is grpc.StatusCode.INTERNAL and error.details() == "Internal error from Core"
    kind = errors.WorkerUnavailable if lost else _FALLBACK.get(error.code(), errors.InternalError)
    # gRPC's own details name addresses and paths, which are nobody's business outside: log them, send a plain sentence
    log.log(logging.DEBUG if quiet else logging.WARNING, "%s failed: %s: %s", peer, error.code().name, error.details())
    return kind(f"the {peer} did not answer ({error.code().name.lower()}); try again")


class _ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Map errors of a servicer to a gRPC status; an unexpected one is logged here and leaves no traceback."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        if handler.response_streaming:
            raise NotImplementedError("no method of ours streams answers")
        behaviour = handler.stream_unary if handler.request_streaming else handler.unary_unary
        wrap = grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler

        async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            async with _mapped(context):
                return await behaviour(request, context)

        return wrap(
            guarded,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


@contextlib.asynccontextmanager
async def _mapped(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    try:
        yield
    except errors.DvdError as error:
        context.set_trailing_metadata(((_CODE_KEY, error.code),))
        await context.abort(error.grpc_code, str(error))
    except (grpc.aio.AbortError, grpc.aio.BaseError):
        raise
    except Exception:
        log.exception("unexpected error in a service method")
        await context.abort(grpc.StatusCode.INTERNAL, "internal error; see this worker's log")

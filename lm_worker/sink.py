"""The sink: a gRPC service that receives embeddings into shared memory.

It is a separate process, so that large deliveries do not share an interpreter with vLLM's HTTP server. Its standard input
comes from its language worker: the line `drain` makes `Describe` report that the worker is about to stop, and the end of the
input, that is of the worker, ends the sink.
"""

import asyncio
import contextlib
import json
import logging
import math
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from common import embedding_stream, errors, logs, rpc
from common.checkpoint import open_checkpoint
from common.descriptors import raise_limit
from common.embedding import Header, validate_key
from common.grants import GrantSigner, SinkGrants
from common.messages import checkpoint_message, dtype_from_proto, dtype_to_proto
from common.metrics import serve_metrics
from common.processes import die_with_parent
from common.security import OPEN, TOKEN_VARIABLE, Credentials, TlsFiles, is_private
from common.transport import base, direct_call
from common.transport.shared_memory import SharedMemoryReceiver
from lm_worker.delivery_messages import StallTimer, first_message, receive_values
from lm_worker.direct_calls import DirectCallServer, call_receivers, listen_on_path, listen_on_port
from lm_worker.metrics import Metrics
from lm_worker.shared_memory import default_budget, remove_folder
from lm_worker.store import MAX_DESCRIPTORS, Store
from protos import embeddings_pb2 as pb
from protos import embeddings_pb2_grpc

log = logging.getLogger("dvd.sink")  # not __name__: that is __main__

DRAIN_LINE = b"drain\n"
"""What a language worker writes to the sink's standard input when it begins to stop."""

_STOP_GRACE_SECONDS = 5.0
_HANG_SECONDS = 5.0
"""Time after the grace period until a sink that hangs is ended."""
_MIN_BYTES_PER_SECOND = 1 << 20
"""Slowest delivery, on average: a slower one would hold its memory and its key for too long."""
_MAX_KEYS = 4096
"""Maximum number of keys in one lookup: more images than fit any context."""
_MAX_MESSAGE_BYTES = 4 << 20
"""Largest message: a few chunks of values, or a lookup of as many keys as are allowed."""


@dataclass(frozen=True)
class SinkOptions:
    """Options with which a language worker starts its sink.

    Attributes:
        model: Folder of the checkpoint.
        listen: Address of the gRPC server.
        http: Address of vLLM's HTTP server, which `Describe` returns.
        dtype: Dtype of every embedding: that of the language model, or a narrow one.
        folder: Shared memory (`lm_worker/shared_memory.py`).
        budget: Bytes of shared memory; 0 chooses a default.
        lease: Seconds for which an embedding is not evicted; see `Store`.
        metrics_port: Port of `/metrics`; 0: none.
        log_level: Level of the process' log.
        log_format: `text` or `json`.
        language_fingerprint: Fingerprint of the language weights, which `Describe` returns.
        delivery_port: TCP port beside `listen` that receives embeddings; 0: a free one; -1: none. None if there is TLS.
        tls: Paths of certificate, key and authorities, and the name in certificates (or none); empty: no TLS. The cluster
            token is no option, since arguments are visible to every user: it comes by variable.
        stall_seconds: Seconds without a message after which a delivery is ended.
        model_dtype: Dtype in which the language model computes; empty: `dtype`.
    """

    model: str
    listen: str
    http: str
    dtype: str
    folder: str
    budget: int
    lease: float
    metrics_port: int = 0
    log_level: str = "info"
    log_format: str = "text"
    language_fingerprint: str = ""
    stall_seconds: float = 20.0
    delivery_port: int = 0
    tls: tuple[str, ...] = ()
    model_dtype: str = ""

    def arguments(self) -> list[str]:
        """Arguments for Python that start this sink."""
        return ["-P", "-m", "lm_worker.sink", json.dumps(asdict(self))]


class Sink(embeddings_pb2_grpc.EmbeddingSinkServicer):
    """Implements the gRPC service `EmbeddingSink` of `protos/embeddings.proto`.

    Attributes:
        draining: Whether `Describe` reports that the language worker is about to stop.
    """

    def __init__(
        self,
        options: SinkOptions,
        store: Store,
        metrics: Metrics,
        credentials: Credentials = OPEN,
        receivers: Sequence[base.Receiver] = (),
    ) -> None:
        self._id = secrets.token_hex(16)
        self._grants = SinkGrants(self._id, GrantSigner(credentials))
        checkpoint = open_checkpoint(options.model)
        self.draining = False
        self._store, self._metrics = store, metrics
        self._dtype, self._model_dtype = options.dtype, options.model_dtype or options.dtype
        metrics.common.set_model(checkpoint.fingerprint, checkpoint.description.family, self._model_dtype)
        self._width = checkpoint.description.width
        self._fingerprint = checkpoint.fingerprint
        self._context = checkpoint.description.context
        self._http = options.http
        self._language_fingerprint = options.language_fingerprint
        self._stall_seconds = options.stall_seconds
        self._receivers = receivers
        self._checkpoint = checkpoint_message(checkpoint)
        self._in_flight: dict[str, asyncio.Future[None]] = {}

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.LanguageDescription:  # noqa: N802
        """The checkpoint, the dtypes, vLLM's address, the use of shared memory, and whether the language worker is draining."""
        return pb.LanguageDescription(
            checkpoint=self._checkpoint, dtype=dtype_to_proto(self._dtype), http=self._http,
            used_bytes=self._store.used, budget_bytes=self._store.budget, draining=self.draining,
            language_fingerprint=self._language_fingerprint, sink=self._id, model_dtype=dtype_to_proto(self._model_dtype),
        )  # fmt: skip

    async def Has(self, request: pb.HasRequest, context: Any) -> pb.HasReply:  # noqa: N802
        """Visual tokens of each key, 0 if its embedding is not stored: vLLM then waits for it. Renews the leases.

        Raises:
            InvalidRequest: There are too many keys, one is not a key, or the time is no number of seconds.
        """
        if len(request.keys) > _MAX_KEYS:
            raise errors.InvalidRequest(f"Has was called with {len(request.keys)} keys; expected at most {_MAX_KEYS}.")
        if not 0 <= request.expect_seconds < math.inf:
            raise errors.InvalidRequest(f"expect_seconds is {request.expect_seconds}; expected a number of at least 0.")
        for key in request.keys:
            validate_key(key)
        return pb.HasReply(tokens=[self._store.rows(key, request.expect_seconds) for key in request.keys])

    async def Deliver(self, request: AsyncIterator[bytes], context: Any) -> pb.DeliverReply:  # noqa: N802
        """Store the embedding of a stream: a header, then its values."""
        logs.adopt_request_id(context)
        with self._log_and_count() as fields:
            already_here = await self._store_delivery(request, fields, context)
            fields["outcome"] = "already_here" if already_here else "stored"
            self._metrics.deliveries.labels(fields["outcome"]).inc()
        return pb.DeliverReply(already_here=already_here)

    @contextlib.contextmanager
    def _log_and_count(self) -> Iterator[dict[str, Any]]:
        """Log one delivery when it ends, with the fields that the block has set, and count it if it fails."""
        started, fields, level = time.monotonic(), dict[str, Any](), logging.DEBUG
        try:
            yield fields
        except BaseException as error:  # cancellation included: the sender has disconnected
            fields["error"], level = errors.error_code(error), logging.WARNING
            self._metrics.refusals.labels(fields["error"]).inc()
            raise
        finally:
            if log.isEnabledFor(level):
                log.log(level, "delivery", extra=logs.extra_fields(**fields, seconds=round(time.monotonic() - started, 4)))

    async def _store_delivery(self, messages: AsyncIterator[bytes], log_fields: dict[str, Any], context: Any) -> bool:
        """Store the embedding unless it is stored already. Returns whether it was."""
        stall = StallTimer(self._stall_seconds)
        async with stall.limit():
            first = await first_message(messages)
        header = self._validate_header(first)
        self._grants.verify(first.grant, header)
        log_fields["bytes"] = header.length
        while (other := self._in_flight.get(header.key)) is not None:
            await asyncio.wait([other])
        if header.key in self._store:
            self._store.rows(header.key)  # renews the lease
            return True
        self._grants.check_unused(first.grant)
        self._in_flight[header.key] = done = asyncio.get_running_loop().create_future()
        try:
            log_fields["transport"] = await self._receive(header, messages, stall, context)
            self._grants.use(first.grant)
        finally:
            del self._in_flight[header.key]
            done.set_result(None)
        self._metrics.received.labels(log_fields["transport"]).inc(header.length)
        return False

    def _validate_header(self, header: pb.EmbeddingHeader) -> Header:
        """Convert the header of a delivery, if this language model can use the embedding.

        vLLM does not check shapes, so an invalid embedding must never become visible.

        Raises:
            CheckpointMismatch: The embedding belongs to another checkpoint, or was encoded for another dtype before a restart.
            ContextLengthExceeded: The embedding has more rows than the model's context.
            InvalidRequest: Key, shape or length are wrong.
        """
        key = validate_key(header.key)
        if header.fingerprint != self._fingerprint:
            raise errors.CheckpointMismatch(
                f"The embedding belongs to checkpoint {header.fingerprint[:12]!a}; this language worker serves "
                f"{self._fingerprint[:12]!r}."
            )
        if (dtype := dtype_from_proto(header.dtype)) != self._dtype:
            raise errors.CheckpointMismatch(
                f"The embedding is in {dtype}; this language worker takes {self._dtype} (--embedding-dtype)."
            )
        if header.width != self._width or not header.rows:
            raise errors.InvalidRequest(
                f"The embedding has shape {header.rows} × {header.width}; expected at least 1 row of width {self._width}."
            )
        if header.rows > self._context:
            raise errors.ContextLengthExceeded(
                f"An image of {header.rows} visual tokens exceeds the model's context of {self._context}; send a smaller image."
            )
        expected = Header(key, header.fingerprint, self._dtype, header.rows, header.width)
        if header.length != expected.length:
            raise errors.InvalidRequest(
                f"The embedding's header declares {header.length} bytes; {header.rows} × {header.width} {self._dtype} values "
                f"have {expected.length}."
            )
        return expected

    async def _receive(self, header: Header, messages: AsyncIterator[bytes], stall: StallTimer, context: Any) -> str:
        """Receive the values into a slot of the store. Returns the name of the transport."""
        supported = base.supported_names(context.invocation_metadata())
        with self._store.writing(header) as incoming, contextlib.ExitStack() as stack:
            offers = {
                receiver.name: stack.enter_context(receiver.offer(incoming, stall.restart))
                for receiver in (*self._receivers, *call_receivers(context))
                if receiver.name in supported
            }
            await embedding_stream.request_values(context, {name: offer.text for name, offer in offers.items()})
            async with stall.limit(self._stall_seconds + header.length / _MIN_BYTES_PER_SECOND, header.length):
                transport = await receive_values(incoming, messages, offers, stack.close, stall)
        return transport


class SinkServer:
    """Async context manager: serves a sink, and its metrics, inside the block. Removes the shared memory at the end."""

    def __init__(self, options: SinkOptions, credentials: Credentials = OPEN) -> None:
        self._options, self._credentials = options, credentials
        self._folder = Path(options.folder)
        self._store = Store(self._folder, options.budget or default_budget(self._folder), options.lease)
        self._metrics = Metrics(self._store)
        self._server = rpc.create_server(
            options.listen,
            credentials=credentials,
            max_message_bytes=_MAX_MESSAGE_BYTES,
            on_refused=self._metrics.refused_calls.inc,
        )
        self._receivers: list[base.Receiver] = [SharedMemoryReceiver()] if _has_local_senders(options, credentials) else []
        self._direct_calls: DirectCallServer | None = None
        if (listener := _listen_for_direct_calls(options, credentials)) is not None:
            self._direct_calls = DirectCallServer(listener, credentials, self._metrics.refused_calls.inc)
            if listener.family != socket.AF_UNIX:
                self._receivers.append(self._direct_calls)
        self._measuring: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._sink = Sink(self._options, self._store, self._metrics, self._credentials, self._receivers)
        embedding_stream.add_sink_to_server(self._sink, self._server)
        if self._options.metrics_port:
            serve_metrics(self._metrics.registry, self._options.metrics_port)
        self._measuring = asyncio.create_task(self._metrics.common.measure_loop_lag())
        if self._direct_calls is not None:
            self._direct_calls.start(self._sink)
        await self._server.start()
        log.info("sink ready on %s, %.1f GiB", self._options.listen, self._store.budget / 2**30)
        return self

    def drain(self) -> None:
        """Report from now on that the language worker is about to stop."""
        self._sink.draining = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._measuring is not None:
            self._measuring.cancel()
        await self._server.stop(_STOP_GRACE_SECONDS)
        if self._direct_calls is not None:
            await self._direct_calls.close()
        remove_folder(self._folder)  # a killed language worker cannot remove it


def _has_local_senders(options: SinkOptions, credentials: Credentials) -> bool:
    """Whether all senders are on this machine, and may share files with the sink."""
    return options.listen.startswith("unix:") or (credentials.tls is None and is_private(options.listen))


def _listen_for_direct_calls(options: SinkOptions, credentials: Credentials) -> socket.socket | None:
    """Open the second socket, or the port, for direct calls. None if `--delivery-port` forbids it, or with TLS."""
    if (path := direct_call.socket_path(options.listen)) is not None:
        return listen_on_path(path)
    if options.delivery_port < 0 or credentials.tls is not None:
        return None
    return listen_on_port(options.listen.rpartition(":")[0].strip("[]"), options.delivery_port)


async def _run(options: SinkOptions, credentials: Credentials) -> None:
    """Serve until standard input ends or SIGTERM arrives."""
    async with SinkServer(options, credentials) as server:
        await _stop_requested(server.drain, Path(options.folder))


async def _stop_requested(drain: Callable[[], None], folder: Path) -> None:
    loop = asyncio.get_running_loop()
    # Ctrl-C in a terminal reaches every process of the group, but the sink ends with the language worker only
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)

    def follow_language_worker() -> None:
        # os.read, since an interpreter cannot end while a thread holds the lock of sys.stdin
        while line := os.read(0, len(DRAIN_LINE)):
            if line == DRAIN_LINE:
                loop.call_soon_threadsafe(drain)
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            loop.call_soon_threadsafe(stop.set)
        time.sleep(_STOP_GRACE_SECONDS + _HANG_SECONDS)
        remove_folder(folder)  # the event loop hangs: nobody else would return the memory
        os._exit(1)

    threading.Thread(target=follow_language_worker, daemon=True).start()
    await stop.wait()


def _credentials(options: SinkOptions) -> Credentials:
    tls = None
    if options.tls:
        cert, key, authorities, *name = options.tls
        tls = TlsFiles(Path(cert), Path(key), Path(authorities), name[0] if name else None)
    return Credentials(os.environ.pop(TOKEN_VARIABLE, None), tls)


def main() -> None:
    """Run a sink. The only argument is `SinkOptions` as JSON. Exits with 1 and one line if it cannot serve."""
    # SIGCONT, not SIGKILL: it wakes a sink that is stopped, which then reads the end of its input and removes its memory
    die_with_parent(signal.SIGCONT)
    options = SinkOptions(**json.loads(sys.argv[1]))
    logs.configure(options.log_level, options.log_format)
    raise_limit(MAX_DESCRIPTORS)
    with contextlib.suppress(KeyboardInterrupt):
        try:
            asyncio.run(_run(options, _credentials(options)))
        except OSError as error:
            sys.exit(f"dvd language: {error}")


if __name__ == "__main__":
    main()

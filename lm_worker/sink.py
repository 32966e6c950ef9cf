"""The sink: receives embeddings over gRPC into shared memory. A process of its own, so that gigabytes arriving never share
an interpreter with vLLM's HTTP server. Ends when its standard input does, which is when its language worker is gone."""

import asyncio
import contextlib
import json
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import embedding_stream, errors, logs, rpc
from common.checkpoint import open_checkpoint
from common.embedding import Header
from common.messages import checkpoint_message, dtype_from_proto, dtype_to_proto
from common.metrics import serve_metrics
from lm_worker.metrics import Metrics
from lm_worker.store import Store, checked_key, default_budget, remove_folder
from protos import embeddings_pb2 as pb
from protos import embeddings_pb2_grpc

log = logging.getLogger("dvd.sink")  # not __name__: that is __main__

GRACE = 5.0


@dataclass(frozen=True)
class SinkOptions:
    """What the language worker tells its sink. `dtype` is the language model's; `http` is vLLM's address."""

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

    def arguments(self) -> list[str]:
        """To start the sink with."""
        return ["-m", "lm_worker.sink", json.dumps(asdict(self))]


class Sink(embeddings_pb2_grpc.EmbeddingSinkServicer):
    """Serves `EmbeddingSink` for one language worker."""

    def __init__(self, options: SinkOptions, store: Store, metrics: Metrics) -> None:
        checkpoint = open_checkpoint(options.model)
        self._store, self._metrics = store, metrics
        metrics.common.set_model(checkpoint.fingerprint, checkpoint.description.family, options.dtype)
        self._dtype = options.dtype
        self._width = checkpoint.description.width
        self._fingerprint = checkpoint.fingerprint
        self._context = checkpoint.description.context
        self._http = options.http
        self._shares_files = options.listen.startswith("unix:")  # whoever reaches it is on this machine
        self._checkpoint = checkpoint_message(checkpoint)
        self._arriving: dict[str, asyncio.Future[None]] = {}

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.LanguageDescription:  # noqa: N802
        return pb.LanguageDescription(
            checkpoint=self._checkpoint, dtype=dtype_to_proto(self._dtype), http=self._http,
            used_bytes=self._store.used, budget_bytes=self._store.budget,
        )  # fmt: skip

    async def Has(self, request: pb.HasRequest, context: Any) -> pb.HasReply:  # noqa: N802
        return pb.HasReply(tokens=[self._store.rows(key) for key in request.keys])

    async def Deliver(self, request: AsyncIterator[bytes], context: Any) -> pb.DeliverReply:  # noqa: N802
        logs.adopt_request_id(context)
        with self._delivery() as line:
            already_here = await self._store_delivery(request, line, context)
            line["outcome"] = "already_here" if already_here else "stored"
            self._metrics.deliveries.labels(line["outcome"]).inc()
        return pb.DeliverReply(already_here=already_here)

    @contextlib.contextmanager
    def _delivery(self) -> Iterator[dict[str, Any]]:
        """A delivery is being served: counted where it fails, and a line in the log when it ends."""
        began, line, level = time.monotonic(), dict[str, Any](), logging.DEBUG
        try:
            yield line
        except BaseException as error:  # also of a sender who has left
            line["error"], level = errors.error_code(error), logging.WARNING
            self._metrics.refusals.labels(line["error"]).inc()
            raise
        finally:
            log.log(level, "delivery", extra=logs.extra_fields(**line, seconds=round(time.monotonic() - began, 4)))

    async def _store_delivery(self, request: AsyncIterator[bytes], line: dict[str, Any], context: Any) -> bool:
        """Whether the embedding was here already."""
        said = await anext(aiter(request), None)
        first = None if said is None else embedding_stream.parse_message(said)
        if first is None or isinstance(first, memoryview) or first.WhichOneof("part") != "header":
            raise errors.InvalidRequest("a delivery begins with a header")
        header = self._checked(first.header)
        line["bytes"] = header.length
        while (other := self._arriving.get(header.key)) is not None:
            await asyncio.wait([other])
        if header.key in self._store:
            self._store.rows(header.key)
            return True
        self._arriving[header.key] = done = asyncio.get_running_loop().create_future()
        try:
            await self._receive(header, request, context)
        finally:
            del self._arriving[header.key]
            done.set_result(None)
        self._metrics.received.inc(header.length)
        return False

    def _checked(self, said: pb.EmbeddingHeader) -> Header:
        """The header, if its embedding is one that this language model can read. Raises `InvalidRequest` or
        `CheckpointMismatch`: vLLM trusts shapes, so nothing wrong may become visible."""
        key = checked_key(said.key)
        if said.fingerprint != self._fingerprint:
            raise errors.CheckpointMismatch(
                f"embedding of checkpoint {said.fingerprint[:12]}, this worker has {self._fingerprint[:12]}"
            )
        if (got := dtype_from_proto(said.dtype)) != self._dtype:
            raise errors.InvalidRequest(f"embedding in {got}, the language model computes in {self._dtype}")
        if said.width != self._width or not said.rows:
            raise errors.InvalidRequest(f"embedding of {said.rows} × {said.width}, expected 1 or more × {self._width}")
        if said.rows > self._context:
            raise errors.ContextLengthExceeded(
                f"an image of {said.rows} visual tokens does not fit a context of {self._context}: send a smaller one"
            )
        header = Header(key, said.fingerprint, self._dtype, said.rows, said.width)
        if said.length != header.length:
            raise errors.InvalidRequest(
                f"embedding of {said.length} bytes, {said.rows} × {said.width} {self._dtype} has {header.length}"
            )
        return header

    async def _receive(self, header: Header, parts: AsyncIterator[bytes], context: Any) -> None:
        with self._store.writing(header) as incoming:
            await embedding_stream.request_values(context, incoming.path if self._shares_files else None)
            async for part in parts:
                chunk = embedding_stream.parse_message(part)
                incoming.add(chunk if isinstance(chunk, memoryview) else chunk.data)
            if not incoming.given:  # the sender has written them: there is more to look at than a loop has time for
                await asyncio.to_thread(incoming.end)


async def serve(options: SinkOptions) -> None:
    """Serve until standard input ends or a signal arrives."""
    folder = Path(options.folder)
    store = Store(folder, options.budget or default_budget(folder), options.lease)
    server = rpc.create_server(options.listen)
    metrics = Metrics(store)
    embedding_stream.add_sink_to_server(Sink(options, store, metrics), server)
    if options.metrics_port:
        serve_metrics(metrics.registry, options.metrics_port)
    watching = asyncio.create_task(metrics.common.measure_loop_lag())
    await server.start()
    log.info("sink ready on %s, %.1f GiB", options.listen, store.budget / 2**30)
    await _parent_gone()
    watching.cancel()
    await server.stop(GRACE)
    remove_folder(folder)  # the language worker may have been killed before it could


async def _parent_gone() -> None:
    loop = asyncio.get_running_loop()
    # a terminal's Ctrl-C reaches every process of its group; only the end of the language worker ends the sink
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    gone = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, gone.set)
    loop.add_reader(sys.stdin, gone.set)
    await gone.wait()


def main() -> None:
    options = SinkOptions(**json.loads(sys.argv[1]))
    logs.configure(options.log_level, options.log_format)
    with contextlib.suppress(KeyboardInterrupt):
        try:
            asyncio.run(serve(options))
        except OSError as error:
            sys.exit(f"dvd language: {error}")


if __name__ == "__main__":
    main()

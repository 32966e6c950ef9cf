"""Clients of the two kinds of worker: gRPC to vision workers and sinks, HTTP to vLLM."""

import contextlib
import io
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from common import errors, logs, rpc
from common.addresses import is_unreachable_loopback, vllm_address
from common.security import OPEN, Credentials, TlsClock
from protos import embeddings_pb2 as pb
from protos import embeddings_pb2_grpc, vision_pb2, vision_pb2_grpc
from server.metrics import EngineLoad

log = logging.getLogger(__name__)

_LOAD_METRICS = ("vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc")
_WAITING_BY_REASON = "vllm:num_requests_waiting_by_reason"
_MAX_METRICS_BYTES = 4 << 20
_LARGE_BODY_BYTES = 1 << 20
_IDLE_CONNECTION_SECONDS = 2
"""vLLM closes idle connections after 5 s; one that it is about to close must not be used for a request."""


class VisionClient:
    """Client of one vision worker. `async with`, or `close()` it; needs a running event loop."""

    def __init__(self, address: str, credentials: Credentials = OPEN) -> None:
        self.address, self._credentials = address, credentials
        self._connection = rpc.Connection(address, credentials)

    @property
    def _stub(self) -> vision_pb2_grpc.VisionStub:
        return self._connection.stub(vision_pb2_grpc.VisionStub)

    async def __aenter__(self) -> "VisionClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def describe(self, timeout: float) -> vision_pb2.VisionDescription:
        """Return the worker's description, within `timeout` seconds. Raises what the worker raises, or `WorkerUnavailable`."""
        with rpc.translate_errors("vision worker", quiet=True):
            description: vision_pb2.VisionDescription = await self._stub.Describe(
                pb.DescribeRequest(), timeout=timeout, metadata=self._credentials.metadata
            )
        return rpc.require_message(description, "vision worker")

    async def encode(self, request: vision_pb2.EncodeRequest, timeout: float) -> vision_pb2.EncodeReply:
        """Encode images, within `timeout` seconds.

        Raises:
            DvdError: What the worker raises.
            WorkerUnavailable: The worker does not answer, or with no message.
            InternalError: Its reply does not match the call.
        """
        with rpc.translate_errors("vision worker"):
            metadata = (*logs.request_metadata(), *self._credentials.metadata)
            reply: vision_pb2.EncodeReply = await self._stub.Encode(request, timeout=timeout, metadata=metadata)
        rpc.require_message(reply, "vision worker")
        if [image.key for image in reply.images] != [image.key for image in request.images]:
            raise errors.InternalError("The vision worker replied with other images than those of the call.")
        if not all(image.tokens for image in reply.images):
            raise errors.InternalError("The vision worker replied with an embedding of no tokens.")
        return reply

    async def close(self) -> None:
        """Close the channel."""
        await self._connection.close()


class LanguageClient:
    """Client of one language worker: of its sink, and of vLLM's server, whose address the sink reports.

    `async with`, or `close()` it; needs a running event loop.
    """

    def __init__(self, address: str, credentials: Credentials = OPEN) -> None:
        self.address, self._credentials = address, credentials
        self._connection = rpc.Connection(address, credentials)
        self._tls = credentials.tls.client_context() if credentials.tls else None
        self._tls_clock = TlsClock(credentials.tls)
        self._http = ""
        self._base_url = ""
        self._session: aiohttp.ClientSession | None = None

    @property
    def _sink(self) -> embeddings_pb2_grpc.EmbeddingSinkStub:
        return self._connection.stub(embeddings_pb2_grpc.EmbeddingSinkStub)

    async def __aenter__(self) -> "LanguageClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def describe(self, timeout: float) -> pb.LanguageDescription:
        """Return the sink's description, within `timeout` seconds. Raises what the sink raises, or `WorkerUnavailable`."""
        with rpc.translate_errors("language worker", quiet=True):
            description: pb.LanguageDescription = await self._sink.Describe(
                pb.DescribeRequest(), timeout=timeout, metadata=self._credentials.metadata
            )
        rpc.require_message(description, "language worker")
        if self._tls_clock.has_changed():
            self._read_tls()
        if description.http != self._http:
            await self._connect(description.http)
        return description

    async def has(self, keys: Sequence[str], timeout: float, expect_seconds: float = 0) -> list[int]:
        """Return the number of visual tokens that the sink has under each key, 0 for none.

        For `expect_seconds` vLLM waits for those that are missing.
        """
        request = pb.HasRequest(keys=keys, expect_seconds=expect_seconds)
        with rpc.translate_errors("language worker"):
            reply = await self._sink.Has(request, timeout=timeout, metadata=self._credentials.metadata)
        tokens = list(rpc.require_message(reply, "language worker").tokens)
        if len(tokens) != len(keys):
            raise errors.WorkerUnavailable(f"The sink replied with {len(tokens)} counts for {len(keys)} keys.")
        return tokens

    async def get(self, path: str, timeout: float) -> Any:
        """Return a JSON response of vLLM, None if its body is empty. Raises `WorkerUnavailable`, `DeadlineExceeded`."""
        async with self.request("GET", path, timeout=timeout) as response:
            if response.status != 200:
                raise errors.WorkerUnavailable(f"The language worker answered {path} with status {response.status}.")
            try:
                return await response.json() if await response.read() else None
            except TimeoutError:
                raise errors.DeadlineExceeded(f"The language worker did not answer {path} in time.") from None
            except (aiohttp.ClientError, ValueError):
                raise errors.WorkerUnavailable(f"The language worker's response to {path} is incomplete.") from None

    async def text(self, path: str, timeout: float, limit: int) -> bytes:
        """Return a response of vLLM of at most `limit` bytes. Raises `WorkerUnavailable`, `DeadlineExceeded`."""
        # identity: vLLM compresses if it may
        async with self.request("GET", path, headers={"Accept-Encoding": "identity"}, timeout=timeout) as response:
            body = bytearray()
            try:
                async for chunk in response.content.iter_any():
                    body += chunk
                    if len(body) > limit:
                        raise errors.WorkerUnavailable(f"The language worker's response to {path} exceeds {limit} bytes.")
            except TimeoutError:
                raise errors.DeadlineExceeded(f"The language worker did not answer {path} in time.") from None
            except aiohttp.ClientError:
                raise errors.WorkerUnavailable(f"The language worker's response to {path} is incomplete.") from None
            if response.status != 200:
                raise errors.WorkerUnavailable(f"The language worker answered {path} with status {response.status}.")
        return bytes(body)

    async def is_healthy(self, timeout: float) -> bool:
        """Return whether vLLM answers and its engine runs."""
        try:
            await self.get("/health", timeout)
        except errors.DvdError:
            return False
        return True

    async def load(self, timeout: float) -> EngineLoad | None:
        """Return the load that vLLM reports in its metrics; None if it reports none."""
        query = "&".join(f"name[]={name}" for name in (*_LOAD_METRICS, _WAITING_BY_REASON))
        try:
            # with the slash: only at this path does vLLM honour name[], which selects a few of a thousand lines
            text = await self.text(f"/metrics/?{query}", timeout, _MAX_METRICS_BYTES)
            return _parse_load(text.decode())
        except (errors.DvdError, ValueError):
            return None

    @contextlib.asynccontextmanager
    async def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request to vLLM and yield its response, whose body is not read yet.

        Raises:
            WorkerUnavailable: vLLM does not answer.
            DeadlineExceeded: vLLM did not answer within `timeout` seconds.
        """
        if self._session is None:
            raise errors.WorkerUnavailable("The language worker has not been probed yet; retry later.", retry_after=1)
        limits = aiohttp.ClientTimeout(total=timeout)
        try:
            response = await _send(
                self._session, method, self._base_url + path, body, headers=headers, timeout=limits, **self._tls_options()
            )
        except TimeoutError:
            raise errors.DeadlineExceeded(f"The language worker did not answer {path} in time.") from None
        except (aiohttp.ClientError, OSError):
            raise errors.WorkerUnavailable("The language worker does not answer; retry later.", retry_after=1) from None
        try:
            yield response
        finally:
            # not release(): the connection of an unfinished response must be closed, so that vLLM aborts the request
            response.close()

    async def _connect(self, http: str) -> None:
        path = http.removeprefix("unix:")
        unix = path != http
        limits: Any = {"limit": 0, "keepalive_timeout": _IDLE_CONNECTION_SECONDS}
        if self._tls and not unix:
            limits["ssl"] = self._tls
        connector: aiohttp.BaseConnector = aiohttp.UnixConnector(path, **limits) if unix else aiohttp.TCPConnector(**limits)
        tracing = aiohttp.TraceConfig()
        tracing.on_connection_reuseconn.append(_note_reuse)
        session = aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,
            read_bufsize=1 << 20,
            trace_configs=[tracing],
            headers=self._credentials.headers,
        )
        # replaced before the old one is closed: two probes may run at once
        old, self._session = self._session, session
        self._base_url = self._url_of(http)
        self._http = http
        if old is not None:
            await old.close()

    def _url_of(self, http: str) -> str:
        """Return the URL of vLLM's server as seen from here, and log a warning if it cannot be reached."""
        if http.startswith("unix:"):
            return "http://vllm"
        if is_unreachable_loopback(http, self.address):
            log.warning(
                "language worker %s reports vLLM at %s, which is not reachable from other machines: "
                "start it with --http=0.0.0.0:%s", self.address, http, http.rpartition(":")[2],
            )  # fmt: skip
        return f"{'https' if self._tls else 'http'}://{vllm_address(http, self.address)}"

    def _tls_options(self) -> dict[str, str]:
        name = self._credentials.tls.name if self._credentials.tls else None
        return {"server_hostname": name} if name and self._base_url.startswith("https") else {}

    def _read_tls(self) -> None:
        """Use the new files of TLS for new connections."""
        assert self._tls is not None
        assert self._credentials.tls is not None
        try:
            self._tls.load_verify_locations(self._credentials.tls.ca)
            self._tls.load_cert_chain(self._credentials.tls.cert, self._credentials.tls.key)
        except OSError as error:
            log.warning("the new TLS files cannot be read: %s", error)

    async def close(self) -> None:
        """Close the channel and the HTTP connections."""
        if self._session is not None:
            await self._session.close()
        await self._connection.close()


def _parse_load(text: str) -> EngineLoad | None:
    """Parse vLLM's metrics; with data parallelism there is a sample per engine. Raises `ValueError` on malformed text.

    Requests that wait for images and not for vLLM do not count as waiting.
    """
    samples: dict[str, list[float]] = {name: [] for name in _LOAD_METRICS}
    deferred = 0.0
    for family in text_string_to_metric_families(text):
        if family.name in samples:
            samples[family.name] += [sample.value for sample in family.samples]
        elif family.name == _WAITING_BY_REASON:
            deferred += sum(sample.value for sample in family.samples if sample.labels.get("reason") == "deferred")
    if not all(samples.values()):
        return None
    waiting, running, kv_cache = samples.values()
    return EngineLoad(max(sum(waiting) - deferred, 0.0), sum(running), max(kv_cache))


async def _send(
    session: aiohttp.ClientSession, method: str, url: str, body: bytes | None, **options: Any
) -> aiohttp.ClientResponse:
    """Send a request; again if a kept connection breaks: vLLM closes one after an internal error, maybe just as it is used."""
    while True:
        connection: dict[str, bool] = {}
        data = io.BytesIO(body) if body and len(body) > _LARGE_BODY_BYTES else body  # written in pieces
        try:
            return await session.request(method, url, data=data, trace_request_ctx=connection, **options)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            if not connection.get("reused"):
                raise


async def _note_reuse(_session: aiohttp.ClientSession, context: Any, _parameters: Any) -> None:
    context.trace_request_ctx["reused"] = True

"""The two kinds of worker as the gateway sees them."""

import contextlib
import ipaddress
import logging
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp

from common import errors, logs, rpc
from protos import embeddings_pb2 as pb
from protos import embeddings_pb2_grpc, vision_pb2, vision_pb2_grpc
from server.metrics import Load

log = logging.getLogger(__name__)

_HERE = "127.0.0.1"
_LOAD = ("vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc")
_MOST_METRICS = 4 << 20


class VisionClient:
    """One vision worker. Make it inside the event loop."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = rpc.open_channel(address)
        self._stub = vision_pb2_grpc.VisionStub(self._channel)

    async def describe(self, timeout: float) -> vision_pb2.VisionDescription:
        with rpc.translate_errors("vision worker", quiet=True):
            said: vision_pb2.VisionDescription = await self._stub.Describe(pb.DescribeRequest(), timeout=timeout)
        return said

    async def encode(self, request: vision_pb2.EncodeRequest, timeout: float) -> vision_pb2.EncodeReply:
        with rpc.translate_errors("vision worker"):
            reply: vision_pb2.EncodeReply = await self._stub.Encode(request, timeout=timeout, metadata=logs.request_metadata())
        return reply

    async def close(self) -> None:
        await self._channel.close()


class LanguageClient:
    """One language worker: its sink, and vLLM's server, whose address the sink tells."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = rpc.open_channel(address)
        self._sink = embeddings_pb2_grpc.EmbeddingSinkStub(self._channel)
        self._http = ""
        self._base = ""
        self._session: aiohttp.ClientSession | None = None

    async def describe(self, timeout: float) -> pb.LanguageDescription:
        with rpc.translate_errors("language worker", quiet=True):
            said: pb.LanguageDescription = await self._sink.Describe(pb.DescribeRequest(), timeout=timeout)
        if said.http != self._http:
            await self._connect(said.http)
        return said

    async def has(self, keys: Sequence[str], timeout: float) -> list[int]:
        """Visual tokens that the sink has under each key, 0 for none."""
        with rpc.translate_errors("language worker"):
            return list((await self._sink.Has(pb.HasRequest(keys=keys), timeout=timeout)).tokens)

    async def get(self, path: str, timeout: float) -> Any:
        """A JSON answer of vLLM's server, None where the body is empty. Raises `Unavailable`, `DeadlineExceeded`."""
        async with self.request("GET", path, timeout=timeout) as answer:
            if answer.status != 200:
                raise errors.Unavailable(f"the language worker answered {answer.status}")
            try:
                return await answer.json() if await answer.read() else None
            except TimeoutError:
                raise errors.DeadlineExceeded("the language worker did not answer in time") from None
            except (aiohttp.ClientError, ValueError):
                raise errors.Unavailable("the language worker's answer broke off") from None

    async def text(self, path: str, timeout: float, limit: int) -> bytes:
        """What vLLM's server answers, of at most `limit` bytes. Raises `Unavailable`, `DeadlineExceeded`."""
        # identity: where vLLM may, it compresses
        async with self.request("GET", path, headers={"Accept-Encoding": "identity"}, timeout=timeout) as answer:
            body = bytearray()
            try:
                async for chunk in answer.content.iter_any():
                    body += chunk
                    if len(body) > limit:
                        raise errors.Unavailable(f"the language worker's {path} has more than {limit} bytes")
            except TimeoutError:
                raise errors.DeadlineExceeded("the language worker did not answer in time") from None
            except aiohttp.ClientError:
                raise errors.Unavailable("the language worker's answer broke off") from None
            if answer.status != 200:
                raise errors.Unavailable(f"the language worker answered {answer.status}")
        return bytes(body)

    async def load(self, timeout: float) -> Load | None:
        """What vLLM says of its own load; None where it says nothing."""
        wanted = "&".join(f"name[]={name}" for name in _LOAD)
        try:
            # with the slash: only there does vLLM look at name[], which makes a few lines of a thousand
            said = await self.text(f"/metrics/?{wanted}", timeout, _MOST_METRICS)
            found = {name: [float(value) for value in _samples(name, said)] for name in _LOAD}
        except (errors.DvdError, ValueError):
            return None
        if not all(found.values()):
            return None
        waiting, running, kv_cache = found.values()
        return Load(sum(waiting), sum(running), max(kv_cache))

    @contextlib.asynccontextmanager
    async def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer of vLLM's server, its body still to be read. Raises `Unavailable`, `DeadlineExceeded`."""
        if self._session is None:
            raise errors.Unavailable("the language worker is not there yet; try again", retry_after=1)
        limits = aiohttp.ClientTimeout(total=timeout)
        try:
            answer = await self._session.request(method, self._base + path, data=body, headers=headers, timeout=limits)
        except TimeoutError:
            raise errors.DeadlineExceeded("the language worker did not answer in time") from None
        except (aiohttp.ClientError, OSError):
            raise errors.Unavailable("the language worker does not answer; try again", retry_after=1) from None
        try:
            yield answer
        finally:
            # not release(): an unfinished answer must be cut, so that vLLM aborts its request
            answer.close()

    async def _connect(self, http: str) -> None:
        path = http.removeprefix("unix:")
        unix = path != http
        # vLLM closes idle connections after 5 s; one it is about to close must not be taken for a request
        kept: Any = {"limit": 0, "keepalive_timeout": 2}
        connector: aiohttp.BaseConnector = aiohttp.UnixConnector(path, **kept) if unix else aiohttp.TCPConnector(**kept)
        session = aiohttp.ClientSession(connector=connector, auto_decompress=False, read_bufsize=1 << 20)
        # exchanged before the old one is closed: two probes may be here at once
        old, self._session = self._session, session
        self._base = "http://vllm" if unix else f"http://{self._from_here(http)}"
        self._http = http
        if old is not None:
            await old.close()

    def _from_here(self, http: str) -> str:
        """Where vLLM's server is found: on the sink's machine, where it listens on every address of that."""
        host, _, port = http.rpartition(":")
        machine = _HERE if self.address.startswith("unix:") else self.address.rpartition(":")[0]
        says, asked = _ip(host), _ip(machine)
        if says and says.is_unspecified:
            return f"{machine}:{port}"
        if says and says.is_loopback and not (asked and asked.is_loopback):
            log.warning(
                "the language worker at %s says that vLLM is at %s, which nobody reaches from another machine: "
                "start it with --http=0.0.0.0:%s", self.address, http, port,
            )  # fmt: skip
        return http

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
        await self._channel.close()


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """A host's address where it is one, IPv6 in brackets; no host is every address. None for a name."""
    try:
        return ipaddress.ip_address({"": "0.0.0.0", "localhost": _HERE}.get(host, host.strip("[]")))
    except ValueError:
        return None


def _samples(name: str, text: bytes) -> list[bytes]:
    """Values of one metric, of any labels, in Prometheus' text format."""
    return re.findall(rb"^" + name.encode() + rb"(?:\{.*\})? (\S+)", text, re.MULTILINE)

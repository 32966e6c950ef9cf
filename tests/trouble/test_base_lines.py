"""After something hostile of each kind everything is as before: memory, descriptors, threads, processes, gauges, shared memory.

The gateway, the vision worker and the sink are real processes. Each case happens once before the base line is taken, so that
pools and caches are filled, and again before everything is compared.
"""

import asyncio
import contextlib
import functools
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from PIL import Image

from common import rpc
from common.checkpoint import open_checkpoint
from common.embedding import Header
from common.embedding_stream import data_messages, header_message
from common.security import OPEN, Credentials
from protos import embeddings_pb2
from protos import vision_pb2 as pb
from tests.server.fakes.requests import chat, image_part, text_part
from tests.server.fakes.waiting import wait_until
from tests.trouble import media_stack
from tests.trouble.process_stack import Cluster, start_cluster
from tests.trouble.process_state import children, cpu_seconds
from tests.trouble.test_hostile_media import repeat_last_scan

Attack = Callable[[Cluster], Awaitable[None]]

STRANGERS = 40
KEY = "k" * 64
CHECKPOINT = open_checkpoint(media_stack.CHECKPOINT)


@pytest.fixture(scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    folder = tmp_path_factory.mktemp("base-lines")
    flags = ("--head-timeout=1", "--max-connections=30", "--max-queue-seconds=60")
    async with start_cluster(folder, *flags, vision_flags=("--decode-timeout=2",)) as running:
        await asyncio.gather(*(running.assert_serves() for _ in range(8)))
        yield running


async def refused(cluster: Cluster, body: Any, code: str, status: int = 400) -> None:
    response = await cluster.gateway.post(body)
    assert (response.status, response.error["code"]) == (status, code), response.body


async def send_image(cluster: Cluster, file: bytes) -> None:
    await refused(cluster, chat(text_part("a"), image_part(file)), "invalid_image")


@functools.cache
def slow_image() -> bytes:
    """Return an image that takes more CPU time to decode than any may."""
    return repeat_last_scan(50)


async def send_many_scans(cluster: Cluster) -> None:
    await send_image(cluster, repeat_last_scan(600, 2000))


async def send_slow_image(cluster: Cluster) -> None:
    await send_image(cluster, slow_image())


async def abandon_a_decode(cluster: Cluster) -> None:
    before = {pid: cpu_seconds(pid) for pid in children(cluster.pids["vision"])}
    _, writer = await cluster.gateway.start_chat(chat(image_part(slow_image())))

    def is_decoding() -> bool:
        return any(cpu_seconds(pid) > before.get(pid, 0) + 0.5 for pid in children(cluster.pids["vision"]))

    await wait_until(is_decoding, "it is being decoded")
    writer.close()


async def send_a_body_slowly(cluster: Cluster) -> None:
    reader, writer = await cluster.gateway.send_raw(
        "POST /v1/chat/completions HTTP/1.1\nHost: a\nContent-Length: 1000000\n\n", b"{"
    )
    async with asyncio.timeout(60):
        assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
    writer.close()


async def stop_in_a_head(cluster: Cluster) -> None:
    reader, writer = await cluster.gateway.send_raw("POST /v1/chat/completions HTTP/1.1\nHost: a\n")
    async with asyncio.timeout(60):
        assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
    writer.close()


async def connect_silently(cluster: Cluster, port: int = 0) -> None:
    """Open more connections than there may be, send nothing, and wait until the server has closed all of them."""
    strangers = [await asyncio.open_connection("127.0.0.1", port or cluster.gateway.port) for _ in range(STRANGERS)]
    async with asyncio.timeout(60):
        for reader, _ in strangers:
            with contextlib.suppress(ConnectionError):
                assert b"200 OK" not in await reader.read()
    for _, writer in strangers:
        writer.close()


async def connect_to_metrics(cluster: Cluster) -> None:
    for port in cluster.ports.values():
        await connect_silently(cluster, port)


async def send_huge_json(cluster: Cluster) -> None:
    await refused(cluster, b'{"messages":[' + b"{}," * 20_000_000 + b"0]}", "budget_exceeded")


async def send_many_choices(cluster: Cluster) -> None:
    choices = [f"choice {i}" for i in range(100_000)]
    await refused(cluster, {**chat("a"), "structured_outputs": {"choice": choices}}, "budget_exceeded")


async def send_a_regex(cluster: Cluster) -> None:
    await refused(cluster, {**chat("a"), "structured_outputs": {"regex": "((a{1,100}){1,100}){1,100}"}}, "budget_exceeded")


async def ask_for_many_sequences(cluster: Cluster) -> None:
    await refused(cluster, {**chat("a"), "n": 8192}, "budget_exceeded")


async def ask_for_many_tokens(cluster: Cluster) -> None:
    await refused(cluster, {**chat("a"), "n": 100, "max_tokens": 100_000}, "budget_exceeded")


async def status_of(address: str, method: str, messages: list[bytes], credentials: Credentials) -> grpc.StatusCode:
    async with rpc.open_channel(address) as channel:
        call: Any = channel.stream_unary(method)
        try:
            await call(iter(messages), timeout=60, metadata=credentials.metadata)
        except grpc.aio.AioRpcError as error:
            return error.code()
    return grpc.StatusCode.OK


async def deliver(cluster: Cluster, credentials: Credentials) -> grpc.StatusCode:
    """Deliver an embedding that nobody has granted."""
    header = Header(KEY, CHECKPOINT.fingerprint, "float32", 1, CHECKPOINT.description.width)
    messages = [header_message(header), *data_messages(memoryview(bytes(4 * header.width)))]
    return await status_of(cluster.sink, "/dvd.v1.EmbeddingSink/Deliver", messages, credentials)


async def encode(cluster: Cluster, credentials: Credentials) -> grpc.StatusCode:
    """Let an image be encoded and delivered without a grant."""
    request = pb.EncodeRequest(
        images=[pb.Image(key=KEY, data=cluster.good_image())], dtype=embeddings_pb2.FLOAT32, deliver_to=cluster.sink
    )
    return await status_of(cluster.vision, "/dvd.v1.Vision/Encode", [request.SerializeToString()], credentials)


async def deliver_as_a_stranger(cluster: Cluster) -> None:
    assert await deliver(cluster, OPEN) is grpc.StatusCode.UNAUTHENTICATED


async def deliver_without_a_grant(cluster: Cluster) -> None:
    assert await deliver(cluster, cluster.credentials) is grpc.StatusCode.PERMISSION_DENIED


async def encode_as_a_stranger(cluster: Cluster) -> None:
    assert await encode(cluster, OPEN) is grpc.StatusCode.UNAUTHENTICATED


async def encode_without_a_grant(cluster: Cluster) -> None:
    assert await encode(cluster, cluster.credentials) is grpc.StatusCode.PERMISSION_DENIED


async def send_a_bomb(cluster: Cluster) -> None:
    """An image of 65 million pixels in a few kilobytes."""
    file = io.BytesIO()
    Image.new("1", (8100, 8100)).save(file, "PNG")
    await refused(cluster, chat(image_part(file.getvalue())), "image_too_large")


CASES: dict[str, tuple[Attack, str, str | None]] = {
    "JPEG of 600 scans": (send_many_scans, "gateway", 'dvd_errors_total{code="invalid_image"'),
    "image of too many pixels": (send_a_bomb, "gateway", 'dvd_errors_total{code="image_too_large"'),
    "image that takes long": (send_slow_image, "vision", 'dvd_decoder_ends_total{reason="cpu"'),
    "abandoned decode": (abandon_a_decode, "vision", 'dvd_decoder_ends_total{reason="abandoned"'),
    "slow body": (send_a_body_slowly, "gateway", 'dvd_errors_total{code="request_too_slow"'),
    "half a head": (stop_in_a_head, "gateway", 'dvd_requests_total{code="408",route="other"'),
    "silent connections": (connect_silently, "gateway", None),
    "silent connections to metrics": (connect_to_metrics, "gateway", None),
    "huge JSON": (send_huge_json, "gateway", 'dvd_requests_over_budget_total{budget="json_values"'),
    "choices": (send_many_choices, "gateway", 'dvd_requests_over_budget_total{budget="choices"'),
    "regex": (send_a_regex, "gateway", 'dvd_requests_over_budget_total{budget="regex"'),
    "sequences": (ask_for_many_sequences, "gateway", 'dvd_requests_over_budget_total{budget="sequences"'),
    "output tokens": (ask_for_many_tokens, "gateway", 'dvd_requests_over_budget_total{budget="output_tokens"'),
    "delivery of a stranger": (deliver_as_a_stranger, "sink", "dvd_sink_calls_refused_total"),
    "delivery without a grant": (deliver_without_a_grant, "sink", 'dvd_sink_refusals_total{code="grant_refused"'),
    "Encode of a stranger": (encode_as_a_stranger, "vision", "dvd_vision_calls_refused_total"),
    "Encode without a grant": (encode_without_a_grant, "vision", 'dvd_vision_errors_total{code="grant_refused"'),
}
"""What happens, the process that counts it, and its counter; None if it is no request and is not counted."""


@pytest.mark.parametrize(("attack", "process", "counter"), CASES.values(), ids=CASES)
async def test_everything_is_as_before(cluster: Cluster, attack: Attack, process: str, counter: str | None) -> None:
    await attack(cluster)
    await cluster.assert_serves()
    base = await cluster.settled_state()
    before = await cluster.metric(process, counter) if counter else 0
    await attack(cluster)
    if counter:
        await wait_until(functools.partial(has_risen, cluster, process, counter, before), "it is counted")
    await cluster.assert_back_at(base)
    if counter:
        assert await cluster.metric(process, counter) == before + 1
    await cluster.assert_serves()


async def has_risen(cluster: Cluster, process: str, counter: str, before: float) -> bool:
    return await cluster.metric(process, counter) > before


async def test_a_leak_would_be_found(cluster: Cluster) -> None:
    """The comparison itself: what another request holds is a difference."""
    base = await cluster.settled_state()
    _, writer = await cluster.gateway.send_raw("POST /v1/chat/completions HTTP/1.1\nHost: a\nContent-Length: 10\n\n", b"{")
    await cluster.gateway.wait_for_metric("dvd_request_body_bytes", 1)
    state = await cluster.state()
    assert state.gauges != base.gauges
    assert state.processes["gateway"].excess_over(base.processes["gateway"]) == {"descriptors": 1}
    writer.close()
    await cluster.assert_back_at(base)
    await cluster.assert_serves()

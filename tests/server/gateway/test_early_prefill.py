"""Requests that vLLM gets while some of their images are still being encoded."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from common import errors
from tests.server.fakes.handlers import abort_connection, error_response, event_stream, hang, in_turn
from tests.server.fakes.requests import chat, image_part, text_part
from tests.server.fakes.stack import Response, Stack, start_stack
from tests.server.fakes.vllm import COMPLETION, EVENTS, default_response
from tests.server.fakes.waiting import wait_until
from tests.server.gateway.helpers import A, B, C, assert_serves_images, message_content

TOKENS = 256
"""Of an image of one tile, without a router."""

CONTENT = [text_part("first"), image_part(A), text_part("second"), image_part(B)]


class Late:
    """A gateway whose vision worker does not encode image B yet."""

    def __init__(self, stack: Stack) -> None:
        self.stack, self.may_encode = stack, asyncio.Event()
        stack.vision.tokens = TOKENS
        stack.vision.may_encode_image[B] = self.may_encode

    async def send(self, **fields: Any) -> "asyncio.Task[Response]":
        """Send a request with images A and B, and wait until vLLM has it."""
        before = self.received
        response = asyncio.create_task(self.stack.chat(*CONTENT, vir="off", **fields))
        await wait_until(lambda: response.done() or self.received > before, "vLLM has the request")
        assert self.received > before, response.result().body
        return response

    @property
    def received(self) -> int:
        """Requests that any vLLM has received."""
        return sum(len(worker.engine.requests) for worker in self.stack.language_workers)

    @property
    def disconnects(self) -> int:
        """Requests that the gateway has withdrawn from any vLLM."""
        return sum(worker.engine.disconnects for worker in self.stack.language_workers)


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    async with start_stack(tmp_path) as running:
        yield running


@pytest.fixture
async def late(stack: Stack) -> Late:
    return Late(stack)


@pytest.fixture
async def two_languages(tmp_path: Path) -> AsyncIterator[Late]:
    async with start_stack(tmp_path, language=2) as stack:
        yield Late(stack)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_forwarded_while_an_image_is_encoded(late: Late, stream: bool) -> None:
    response = await late.send(stream=stream)
    parts = message_content(late.stack)
    assert [part["image_embeds"] for part in parts if "image_embeds" in part] == 2 * [{"image_num_tokens": [TOKENS]}]
    assert set(late.stack.sink.rows) == {parts[1]["uuid"]}, "image B is not encoded yet"
    assert not response.done(), "the header needs what happened to image B"
    late.may_encode.set()
    served = await response
    assert (served.status, served.body) == (200, b"".join(EVENTS) if stream else COMPLETION)
    assert served.headers["X-DvD-Images"] == (
        f"images=2; tiles=4; compressed=0; tokens={2 * TOKENS}; reused=0; shared=0; encoded=2"
    )
    assert set(late.stack.sink.rows) == {parts[1]["uuid"], parts[3]["uuid"]}


async def test_usage_has_the_visual_tokens(late: Late) -> None:
    late.stack.engine.respond = event_stream(b'data: {"usage":{"prompt_tokens":9}}\n\n')
    response = await late.send(stream=True)
    late.may_encode.set()
    assert b'"image_tokens":512' in (await response).body


async def test_it_is_forwarded_at_once_if_the_sink_has_the_first_image(late: Late) -> None:
    late.stack.vision.may_encode_image[C] = asyncio.Event()
    await late.stack.chat(image_part(A), vir="off")
    response = asyncio.create_task(late.stack.chat(image_part(A), image_part(B), image_part(C), vir="off"))
    await wait_until(lambda: late.received == 2, "vLLM has the request")
    late.may_encode.set()
    late.stack.vision.may_encode_image[C].set()
    assert "reused=1; shared=0; encoded=2" in (await response).headers["X-DvD-Images"]


@pytest.mark.parametrize("fields", [{"vir": "auto"}, {}, {"vir": {"mode": "auto", "relative_threshold": 0.5}}])
async def test_it_waits_for_the_router(late: Late, fields: dict[str, Any]) -> None:
    response = asyncio.create_task(late.stack.chat(*CONTENT, **fields))
    await wait_until(lambda: len(late.stack.sink.rows) == 1, "image A is encoded")
    await asyncio.sleep(0.05)
    assert late.received == 0
    late.may_encode.set()
    assert (await response).status == 200


async def test_it_waits_if_it_is_switched_off(tmp_path: Path) -> None:
    async with start_stack(tmp_path, early_prefill=False) as stack:
        late = Late(stack)
        response = asyncio.create_task(stack.chat(*CONTENT, vir="off"))
        await wait_until(lambda: len(stack.sink.rows) == 1, "image A is encoded")
        await asyncio.sleep(0.05)
        assert late.received == 0
        late.may_encode.set()
        assert (await response).status == 200


async def test_all_tiles_compressed_can_be_counted_too(late: Late) -> None:
    late.stack.vision.tokens = 64
    response = asyncio.create_task(late.stack.chat(*CONTENT, vir="all"))
    await wait_until(lambda: late.received == 1, "vLLM has the request")
    late.may_encode.set()
    assert "compressed=4; tokens=128" in (await response).headers["X-DvD-Images"]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_encode_that_fails_is_the_answer_and_withdraws_the_request(late: Late, stream: bool) -> None:
    late.stack.engine.respond = hang
    late.stack.vision.error_of_image[B] = errors.InvalidImage("The image is broken.").at("images[0]")
    response = await late.send(stream=stream)
    late.may_encode.set()
    served = await response
    assert (served.status, served.error["code"]) == (400, "invalid_image")
    assert served.error["param"] == "messages[0].content[3]"
    await wait_until(lambda: late.disconnects == 1, "the request is withdrawn from vLLM")
    late.stack.engine.respond = default_response
    await assert_serves_images(late.stack)


async def test_so_does_one_that_fails_when_vllm_has_answered(late: Late) -> None:
    """With the image in its prefix cache, vLLM needs no embedding."""
    late.stack.vision.error_of_image[B] = errors.InvalidImage("The image is broken.").at("images[0]")
    response = await late.send(stream=True)
    late.may_encode.set()
    assert (await response).error["code"] == "invalid_image"
    await late.stack.wait_until_idle()


async def test_a_vision_worker_that_goes_away_does_not_mark_the_language_worker_down(late: Late) -> None:
    late.stack.engine.respond = hang
    late.stack.vision.error_of_image[B] = errors.WorkerUnavailable("gone")
    response = await late.send()
    late.may_encode.set()
    assert (await response).status == 503
    late.stack.engine.respond = default_response
    assert (await late.stack.chat("text")).status == 200


async def test_a_full_sink_is_the_answer(late: Late) -> None:
    late.stack.engine.respond = hang
    response = await late.send()
    late.stack.sink.error = errors.SinkFull("The sink is full.", retry_after=1)
    late.may_encode.set()
    served = await response
    assert (served.status, served.error["code"]) == (503, "sink_full")
    await wait_until(lambda: late.disconnects == 1, "the request is withdrawn from vLLM")


async def test_a_full_sink_moves_the_request_to_another_language_worker(two_languages: Late) -> None:
    stack = two_languages.stack
    for worker in stack.language_workers:
        worker.engine.respond = hang
    response = await two_languages.send()
    full, other = sorted(stack.language_workers, key=lambda worker: -len(worker.engine.requests))
    full.sink.error = errors.SinkFull("The sink is full.", retry_after=1)
    other.engine.respond = default_response
    two_languages.may_encode.set()
    assert (await response).status == 200
    assert len(other.sink.rows) == 2


@pytest.mark.parametrize("failure", [abort_connection, error_response(500)])
async def test_a_language_worker_that_fails_is_replaced(two_languages: Late, failure: Any) -> None:
    stack = two_languages.stack
    for worker in stack.language_workers:
        worker.engine.respond = in_turn(failure, default_response)
    response = await two_languages.send()
    _, other = sorted(stack.language_workers, key=lambda worker: -len(worker.engine.requests))
    other.engine.respond = default_response
    two_languages.may_encode.set()
    assert (await response).status == 200
    assert two_languages.received == 2


async def test_a_request_that_vllm_rejects_is_answered_at_once(late: Late) -> None:
    late.stack.engine.respond = error_response(400, "temperature is wrong")
    response = await late.send()
    assert (await response).status == 400
    await wait_until(lambda: late.stack.vision.cancelled == 1, "image B is not encoded any more")
    late.stack.engine.respond = default_response
    await assert_serves_images(late.stack)


async def test_tokens_that_were_counted_wrong_are_corrected(late: Late) -> None:
    late.stack.vision.tokens = 100
    late.stack.engine.respond = in_turn(hang, default_response)
    response = await late.send()
    late.may_encode.set()
    assert (await response).status == 200
    counts = [part["image_embeds"]["image_num_tokens"] for part in message_content(late.stack) if "image_embeds" in part]
    assert (counts, late.received, late.disconnects) == ([[100], [100]], 2, 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_both(late: Late, stream: bool) -> None:
    late.stack.engine.respond = hang
    _, writer = await late.stack.start_chat(chat(*CONTENT, vir="off", stream=stream))
    await wait_until(lambda: late.received == 1, "vLLM has the request")
    writer.close()
    await wait_until(lambda: (late.disconnects, late.stack.vision.cancelled) == (1, 1), "both are cancelled")
    late.stack.engine.respond = default_response
    await assert_serves_images(late.stack)


async def test_a_deadline_ends_both(late: Late) -> None:
    late.stack.engine.respond = hang
    response = await late.stack.chat(*CONTENT, vir="off", headers={"X-Request-Timeout": "1"})
    assert response.status == 504
    await wait_until(lambda: (late.disconnects, late.stack.vision.cancelled) == (1, 1), "both are cancelled")


async def test_the_sink_expects_the_embeddings_until_the_deadline(late: Late) -> None:
    late.may_encode.set()
    await late.stack.chat(*CONTENT, vir="off", headers={"X-Request-Timeout": "50"})
    (seconds,) = late.stack.sink.expect_seconds
    assert 0 < seconds <= 50

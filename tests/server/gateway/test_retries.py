"""Lost embeddings are encoded again, and another worker takes over from one that fails."""

from pathlib import Path
from typing import Any

import pytest

from common import errors
from server.retry import MAX_ATTEMPTS
from tests.server.fakes.handlers import error_response, event_stream, in_turn
from tests.server.fakes.requests import image_file, image_part
from tests.server.fakes.stack import Stack, start_stack
from tests.server.fakes.vllm import COMPLETION, EVENTS, default_response
from tests.server.gateway.helpers import BROKEN_RESPONSES, ERROR_EVENT, A


async def test_a_lost_embedding_is_encoded_again_once(stack: Stack) -> None:
    for stream, failure in (
        (False, error_response(500)),
        (True, error_response(500)),
        (True, event_stream(ERROR_EVENT, b"data: [DONE]\n\n")),
    ):
        stack.sink.rows.clear()
        before = len(stack.vision.calls)

        async def lose(request: Any, fail: Any = failure) -> Any:
            stack.sink.rows.clear()
            return await fail(request)

        stack.engine.respond = in_turn(lose, default_response)
        response = await stack.chat(image_part(A), stream=stream)
        assert (response.status, response.body) == (200, b"".join(EVENTS) if stream else COMPLETION)
        assert len(stack.vision.calls) == before + 2
    await stack.wait_until_idle()


async def test_an_embedding_lost_each_time_is_an_error(stack: Stack) -> None:
    async def lose(request: Any) -> Any:
        stack.sink.rows.clear()
        return await error_response(500)(request)

    stack.engine.respond = lose
    response = await stack.chat(image_part(A))
    assert (response.status, response.error["code"]) == (500, "engine_error")
    assert len(stack.engine.requests) == MAX_ATTEMPTS
    await stack.wait_until_idle()


async def test_the_other_vision_worker_takes_over(tmp_path: Path) -> None:
    async with start_stack(tmp_path, vision=2) as stack:
        for i in range(20):
            assert (await stack.chat(image_part(image_file(i)))).status == 200
        first, second = stack.vision_workers
        assert first.calls
        assert second.calls
        await first.stop()
        before = len(first.calls)
        for i in range(20, 40):
            assert (await stack.chat(image_part(image_file(i)))).status == 200
        assert len(first.calls) == before
        await second.stop()
        response = await stack.chat(image_part(image_file(40)))
        assert response.status == 503
        assert response.headers["Retry-After"]
        await first.start()
        await stack.wait_until_ready()
        assert (await stack.chat(image_part(image_file(40)))).status == 200


@pytest.mark.parametrize("failing_part", ["worker", "engine", "sink"])
async def test_the_other_language_worker_takes_over(tmp_path: Path, failing_part: str) -> None:
    async with start_stack(tmp_path, language=2) as stack:
        for i in range(20):
            assert (await stack.chat(image_part(image_file(i)))).status == 200
        first, second = stack.language_workers
        assert first.engine.requests
        assert second.engine.requests
        assert {call.deliver_to for call in stack.vision.calls} == {first.sink.address, second.sink.address}
        failing: Any = {"worker": first, "engine": first.engine, "sink": first.sink}[failing_part]
        await failing.stop()
        for i in range(20):
            assert (await stack.chat(image_part(image_file(i)))).status == 200
            assert (await stack.chat("a")).status == 200
        assert set(second.sink.rows) == {
            part["uuid"] for request in second.engine.requests for part in embedding_parts(request.json)
        }
        await stack.wait_until_idle()


def embedding_parts(body: Any) -> list[Any]:
    """Returns the image parts of the first message; none where its content is a text."""
    content = body["messages"][0]["content"]
    return [part for part in content if part["type"] == "image_embeds"] if isinstance(content, list) else []


@pytest.mark.parametrize("respond", BROKEN_RESPONSES.values(), ids=BROKEN_RESPONSES)
async def test_an_engine_that_breaks_the_connection_is_replaced_by_the_other(tmp_path: Path, respond: Any) -> None:
    async with start_stack(tmp_path, language=2) as stack:
        stack.language_workers[0].engine.respond = respond
        for i in range(10):
            assert (await stack.chat(image_part(image_file(i)))).status == 200
            await stack.wait_until_ready()
        assert stack.language_workers[0].engine.requests


async def test_an_image_on_which_each_vision_worker_fails_once_is_served(tmp_path: Path) -> None:
    """Only the first worker is marked down: the retry of the request asks the second one again."""
    async with start_stack(tmp_path, vision=2) as stack:
        for worker in stack.vision_workers:
            worker.failures.append(errors.WorkerUnavailable("it is restarting"))
        assert (await stack.chat(image_part(A))).status == 200
        assert sorted(len(worker.calls) for worker in stack.vision_workers) == [1, 2]
        await stack.wait_until_idle()


async def test_an_image_on_which_a_vision_worker_fails_is_encoded_by_the_other(tmp_path: Path) -> None:
    async with start_stack(tmp_path, vision=2) as stack:
        failing, working = stack.vision_workers
        failing.error = RuntimeError("a bug")
        for i in range(20):
            assert (await stack.chat(image_part(image_file(i)))).status == 200
        assert failing.calls
        assert len(working.calls) == 20
        assert (await stack.get("/health/ready")).status == 200, "both workers stay up"


async def test_an_image_on_which_all_vision_workers_fail_is_an_error(tmp_path: Path) -> None:
    async with start_stack(tmp_path, vision=3) as stack:
        for worker in stack.vision_workers:
            worker.error = RuntimeError("a bug")
        response = await stack.chat(image_part(A))
        assert (response.status, response.error["code"]) == (500, "internal_error")
        assert [len(worker.calls) for worker in stack.vision_workers] == [1, 1, 1]
        await stack.wait_until_idle()


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_answers_with_500_is_replaced_by_the_other(tmp_path: Path, stream: bool) -> None:
    """As vLLM does while it shuts down."""
    async with start_stack(tmp_path, language=2) as stack:
        failing, working = (worker.engine for worker in stack.language_workers)
        failing.respond = error_response(500)
        for i in range(20):
            assert (await stack.chat(image_part(image_file(i)), stream=stream)).status == 200
            assert (await stack.chat("a", stream=stream)).status == 200
        assert failing.requests
        assert len(working.requests) == 40


async def test_a_request_on_which_all_engines_fail_is_an_error(tmp_path: Path) -> None:
    async with start_stack(tmp_path, language=3) as stack:
        engines = [worker.engine for worker in stack.language_workers]
        for engine in engines:
            engine.respond = error_response(500)
        response = await stack.chat("a")
        assert (response.status, response.error["code"]) == (500, "engine_error")
        assert [len(engine.requests) for engine in engines] == [1, 1, 1]
        await stack.wait_until_idle()


async def test_a_callers_mistake_is_not_sent_to_another_engine(tmp_path: Path) -> None:
    async with start_stack(tmp_path, language=2) as stack:
        engines = [worker.engine for worker in stack.language_workers]
        for engine in engines:
            engine.respond = error_response(400)
        assert (await stack.chat("a")).status == 400
        assert sum(len(engine.requests) for engine in engines) == 1


async def test_a_request_whose_sink_is_full_goes_to_another_language_worker(tmp_path: Path) -> None:
    async with start_stack(tmp_path, language=2) as stack:
        full, other = stack.language_workers
        full.sink.error = errors.SinkFull("no room")
        for i in range(10):
            assert (await stack.chat(image_part(image_file(i)))).status == 200
        assert not full.engine.requests
        assert len(other.engine.requests) == 10
        other.sink.error = errors.SinkFull("no room")
        response = await stack.chat(image_part(image_file(20)))
        assert (response.status, response.error["code"]) == (503, "sink_full")

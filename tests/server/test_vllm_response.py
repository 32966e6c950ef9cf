"""vLLM's responses as the caller gets them."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from common import errors
from server.http import error_format
from server.metrics import Metrics, StreamTimer
from server.request_stats import RequestStats
from server.vllm_response import ENGINE_ERROR_MESSAGE, EventStream, Failure, add_image_tokens


def vllm_error(code: Any, message: str = "bad", **changes: Any) -> bytes:
    return json.dumps({"error": {"message": message, "type": "Bad", "param": None, "code": code, **changes}}).encode()


TOO_LONG = "This model's maximum context length is 4096 tokens. However, you requested 5000"


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (400, vllm_error(400), ("bad", "invalid_request_error", None, "invalid_request")),
        (400, vllm_error(400, param="stop"), ("bad", "invalid_request_error", "stop", "invalid_request")),
        (
            400,
            vllm_error(400, param="input_tokens"),
            ("bad", "invalid_request_error", "input_tokens", "context_length_exceeded"),
        ),
        (400, vllm_error(400, TOO_LONG), (TOO_LONG, "invalid_request_error", None, "context_length_exceeded")),
        (401, vllm_error(401), ("bad", "authentication_error", None, "invalid_api_key")),
        (401, b'{"error": "Unauthorized"}', ('{"error": "Unauthorized"}', "authentication_error", None, "invalid_api_key")),
        (404, vllm_error(404), ("bad", "invalid_request_error", None, "model_not_found")),
        (404, b'{"detail": "Not Found"}', ("Not Found", "invalid_request_error", None, "model_not_found")),
        (422, vllm_error(422), ("bad", "invalid_request_error", None, "invalid_request")),
        (429, vllm_error(429), ("bad", "rate_limit_error", None, "overloaded")),
        (418, b"<html>", ("<html>", "invalid_request_error", None, "invalid_request")),
        (400, b"\xff" * 3, ("\ufffd" * 3, "invalid_request_error", None, "invalid_request")),
        (400, b"[1]", ("[1]", "invalid_request_error", None, "invalid_request")),
        (500, vllm_error(500, "/root/x.py failed", param="x"), (ENGINE_ERROR_MESSAGE, "server_error", None, "engine_error")),
        (500, b"Internal Server Error at 10.0.0.1", (ENGINE_ERROR_MESSAGE, "server_error", None, "engine_error")),
        (503, b"", (ENGINE_ERROR_MESSAGE, "server_error", None, "engine_error")),
        (500, vllm_error(500, TOO_LONG), (ENGINE_ERROR_MESSAGE, "server_error", None, "engine_error")),
    ],
)
def test_errors_are_converted_to_openais_error_object(status: int, body: bytes, expected: tuple[Any, ...]) -> None:
    failure = Failure.parse(status, body)
    assert failure.status == status
    assert tuple(failure.body["error"][name] for name in ("message", "type", "param", "code")) == expected


class Content:
    """The content of a response: chunks, then its end or an error. An `asyncio.Event` delays what follows until it is set."""

    def __init__(self, *chunks: bytes | asyncio.Event, error: Exception | None = None) -> None:
        self._chunks, self._error = list(chunks), error

    async def readany(self) -> bytes:
        while self._chunks:
            chunk = self._chunks[0]
            if isinstance(chunk, bytes):
                self._chunks.pop(0)
                return chunk
            await chunk.wait()
            self._chunks.pop(0)
        if self._error:
            raise self._error
        return b""


def make_stream(*chunks: bytes | asyncio.Event, error: Exception | None = None, **options: Any) -> EventStream:
    response: Any = SimpleNamespace(content=Content(*chunks, error=error))
    return EventStream(response, StreamTimer(Metrics(), RequestStats("request")), **options)


async def read_events(stream: EventStream) -> bytes:
    return b"".join([chunk async for chunk in stream.events()])


EVENT_1, EVENT_2, DONE = b'data: {"n": 1}\n\n', b'data: {"n": 2}\n\n', b"data: [DONE]\n\n"
ROLE = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":'
    b'{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"prompt_token_ids":null,"prompt_text":null}\n\n'
)
MESSAGE_START = b'event: message_start\ndata: {"type":"message_start","message":{"id":"m","content":[]}}\n\n'
ENGINE_ERROR_EVENT = b"data: " + vllm_error(500, "/root/x.py failed") + b"\n\n"
INVALID_REQUEST_EVENT = b"data: " + vllm_error(400, "too hot") + b"\n\n"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 100])
async def test_bytes_pass_unchanged_whatever_the_chunks(size: int) -> None:
    data = EVENT_1 + EVENT_2 + b": a comment\n\n" + DONE
    stream = make_stream(*(data[i : i + size] for i in range(0, len(data), size)))
    assert await stream.start() is None
    assert await read_events(stream) == data


async def test_an_incomplete_last_event_is_passed_on() -> None:
    stream = make_stream(EVENT_1, EVENT_2, b"data: {")
    assert await stream.start() is None
    assert await read_events(stream) == EVENT_1 + EVENT_2 + b"data: {"


@pytest.mark.parametrize("before", [b"", ROLE, ROLE + ROLE.replace(b'"index":0', b'"index":1'), MESSAGE_START])
@pytest.mark.parametrize("size", [1, 10, 1000])
async def test_an_error_after_the_preamble_decides_the_status(before: bytes, size: int) -> None:
    data = before + ENGINE_ERROR_EVENT + DONE
    failure = await make_stream(*(data[i : i + size] for i in range(0, len(data), size))).start()
    assert failure is not None
    assert failure.status == 500
    assert failure.body["error"]["message"] == ENGINE_ERROR_MESSAGE
    data = before + INVALID_REQUEST_EVENT + DONE
    failure = await make_stream(*(data[i : i + size] for i in range(0, len(data), size))).start()
    assert failure is not None
    assert failure.status == 400
    assert failure.body["error"]["message"] == "too hot"


@pytest.mark.parametrize("code", [None, "x", 0, 200, 99999, [], {}])
async def test_an_error_without_a_valid_status_is_the_servers_fault(code: Any) -> None:
    failure = await make_stream(b"data: " + vllm_error(code) + b"\n\n").start()
    assert failure is not None
    assert failure.status == 500


@pytest.mark.parametrize("chunks", [(), (ROLE,), (EVENT_1[:5],), (MESSAGE_START,)])
@pytest.mark.parametrize("error", [aiohttp.ClientPayloadError(), aiohttp.ServerDisconnectedError()])
async def test_a_break_before_the_first_event_can_be_retried(chunks: tuple[bytes, ...], error: Exception) -> None:
    with pytest.raises(errors.Unavailable):
        await make_stream(*chunks, error=error).start()


async def test_an_end_before_the_first_event_can_be_retried() -> None:
    for chunks in ((), (ROLE,), (MESSAGE_START,)):
        with pytest.raises(errors.WorkerUnavailable):
            await make_stream(*chunks).start()


@pytest.mark.parametrize("preamble", [ROLE, MESSAGE_START], ids=["chat", "messages"])
async def test_the_preamble_does_not_start_the_stream(preamble: bytes) -> None:
    later = asyncio.Event()
    stream = make_stream(preamble, later, EVENT_1, DONE)
    starting = asyncio.create_task(stream.start())
    await asyncio.wait([starting], timeout=0.1)
    assert not starting.done()
    later.set()
    assert await starting is None
    assert await read_events(stream) == preamble + EVENT_1 + DONE


@pytest.mark.parametrize(
    "event",
    [
        ROLE.replace(b'"content":""', b'"content":"a"'), ROLE.replace(b'"finish_reason":null', b'"finish_reason":"stop"'),
        b'event: response.created\ndata: {}\n\n', b'data: {"choices":[{"text":"a"}]}\n\n', DONE,
    ],
)  # fmt: skip
async def test_any_other_event_starts_the_stream(event: bytes) -> None:
    never = asyncio.Event()
    assert await asyncio.wait_for(make_stream(event, never).start(), 20) is None


async def test_the_first_event_is_sent_before_the_second_arrives() -> None:
    later = asyncio.Event()
    stream = make_stream(EVENT_1, EVENT_2[:5], later, EVENT_2[5:], DONE)
    assert await stream.start() is None
    events = stream.events()
    assert await anext(events) == EVENT_1
    later.set()
    assert b"".join([event async for event in events]) == EVENT_2 + DONE


async def test_a_stream_may_be_one_event() -> None:
    stream = make_stream(EVENT_1)
    assert await stream.start() is None
    assert await read_events(stream) == EVENT_1


@pytest.mark.parametrize("size", [1, 9, 1000])
async def test_a_late_error_event_reveals_no_internals(size: int) -> None:
    late = EVENT_2 + ENGINE_ERROR_EVENT + DONE
    stream = make_stream(EVENT_1, EVENT_2, *(late[i : i + size] for i in range(0, len(late), size)))
    assert await stream.start() is None
    events = (await read_events(stream)).split(b"\n\n")
    assert events[:3] == [EVENT_1[:-2], EVENT_2[:-2], EVENT_2[:-2]]
    assert json.loads(events[3].removeprefix(b"data: "))["error"]["code"] == "engine_error"
    assert events[4:] == [b"data: [DONE]", b""]
    assert b"/root" not in b"".join(events)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (aiohttp.ClientPayloadError(), "unavailable"),
        (aiohttp.ServerDisconnectedError(), "unavailable"),
        (TimeoutError(), "deadline_exceeded"),
    ],
)
async def test_a_connection_that_breaks_late_ends_the_stream_with_an_error_event(error: Exception, code: str) -> None:
    stream = make_stream(EVENT_1, EVENT_2, b"data: {half", error=error)
    assert await stream.start() is None
    data = await read_events(stream)
    events = data.split(b"\n\n")
    assert events[:2] == [EVENT_1[:-2], EVENT_2[:-2]]
    assert json.loads(events[2].removeprefix(b"data: "))["error"]["code"] == code
    assert events[3:] == [b"data: [DONE]", b""]


CHAT_USAGE = b'"usage":{"prompt_tokens":9,"total_tokens":12,"prompt_tokens_details":%s}'
RESPONSES_USAGE = b'"usage":{"input_tokens":9,"input_tokens_details":{"cached_tokens":4},"output_tokens":3}'
USAGES = {
    "chat with details": (CHAT_USAGE % b'{"cached_tokens":4}', CHAT_USAGE % b'{"cached_tokens":4,"image_tokens":7}'),
    "chat with null details": (CHAT_USAGE % b"null", CHAT_USAGE % b'{"image_tokens":7}'),
    "chat without details": (
        b'"usage":{"prompt_tokens":9}',
        b'"usage":{"prompt_tokens":9,"prompt_tokens_details":{"image_tokens":7}}',
    ),
    "responses": (RESPONSES_USAGE, RESPONSES_USAGE.replace(b'"cached_tokens":4', b'"cached_tokens":4,"image_tokens":7')),
}


@pytest.mark.parametrize(("usage", "expected"), USAGES.values(), ids=USAGES)
def test_visual_tokens_are_added_to_usage_and_nothing_else_changes(usage: bytes, expected: bytes) -> None:
    body = b'{"text":"\\u00e9 \xc3\xa9 \\"usage\\":{\\"prompt_tokens\\":1}","x":1.50, %s ,"y":[ ]}'
    assert add_image_tokens(body % usage, 7) == body % expected
    assert add_image_tokens(body % usage + body % usage, 7) == body % expected + body % expected


OTHER_USAGES = {
    "null": b'{"usage":null}',
    "anthropic": b'{"usage":{"input_tokens":9,"output_tokens":3}}',
    "schema of a tool": b'{"usage":{"type":"object","properties":{"prompt_tokens":{"type":"integer"}}}}',
    "schema of a field prompt_tokens": b'{"usage":{"prompt_tokens":{"type":"integer"}}}',
    "true": b'{"usage":{"prompt_tokens":true}}',
    "truncated": b'{"usage":{"prompt_tokens":9',
    "not JSON": b'{"usage":{prompt_tokens:9}}',
    "nested deeply": b'{"usage":{"prompt_tokens":' + b"[" * 4000 + b"9" + b"]" * 4000 + b"}}",
    "multi-byte character at the size limit": b'{"usage":{"a":"' + b"\xe2\x82\xac" * 3000 + b'"}}',
    "not UTF-8": b'{"usage":{"a":"\xff"}}',
}


@pytest.mark.parametrize("usage", OTHER_USAGES.values(), ids=OTHER_USAGES)
def test_a_usage_that_counts_no_prompt_is_unchanged(usage: bytes) -> None:
    assert add_image_tokens(usage, 7) == usage


@pytest.mark.parametrize("size", [1, 20, 1000])
async def test_visual_tokens_are_added_to_every_usage_of_a_stream(size: int) -> None:
    usage = b'"usage":{"prompt_tokens":9,"completion_tokens":%d}'
    data = b"".join(b"data: {%s}\n\n" % (usage % n) for n in range(3)) + EVENT_1 + b'data: {"usage":null}\n\n' + DONE
    stream = make_stream(*(data[i : i + size] for i in range(0, len(data), size)), image_tokens=7)
    assert await stream.start() is None
    assert await read_events(stream) == data.replace(b"}}", b',"prompt_tokens_details":{"image_tokens":7}}}')


async def test_usage_is_unchanged_without_images() -> None:
    data = b'data: {"usage":{"prompt_tokens":9}}\n\n'
    stream = make_stream(data)
    assert await stream.start() is None
    assert await read_events(stream) == data


async def test_a_silent_stream_sends_keep_alive_comments() -> None:
    later = asyncio.Event()
    stream = make_stream(EVENT_1, EVENT_2[:5], later, EVENT_2[5:], DONE, keep_alive=0.01)
    assert await stream.start() is None
    events = stream.events()
    assert await anext(events) == EVENT_1
    assert [await anext(events) for _ in range(3)] == [b": keep-alive\n\n"] * 3
    later.set()
    rest = [event async for event in events if event != b": keep-alive\n\n"]
    assert b"".join(rest) == EVENT_2 + DONE, "the received part of an event is not lost"


async def test_the_deadline_is_not_taken_for_silence() -> None:
    stream = make_stream(EVENT_1, EVENT_2, error=TimeoutError(), keep_alive=60)
    assert await stream.start() is None
    data = await read_events(stream)
    assert b"deadline_exceeded" in data
    assert b"keep-alive" not in data


NAMED_ERROR_EVENT = b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"/root/x.py failed"}}\n\n'


@pytest.mark.parametrize("api_format", [error_format.OPENAI_RESPONSES, error_format.ANTHROPIC], ids=["responses", "messages"])
async def test_error_events_have_names_in_apis_with_named_events(api_format: error_format.ErrorFormat) -> None:
    start = b"event: content_block_start\ndata: {}\n\n"
    stream = make_stream(start, start, start + NAMED_ERROR_EVENT, error_format=api_format)
    assert await stream.start() is None
    events = (await read_events(stream)).split(b"\n\n")
    assert events[:3] == [start[:-2]] * 3
    assert events[4:] == [b""]
    name, _, data = events[3].partition(b"\n")
    error_event = json.loads(data.removeprefix(b"data: "))
    assert (name, error_event["type"], error_event["error"]["message"]) == (b"event: error", "error", ENGINE_ERROR_MESSAGE)
    assert error_event["error"]["type"] == ("api_error" if api_format is error_format.ANTHROPIC else "server_error")
    stream = make_stream(start, start, error=aiohttp.ClientPayloadError(), error_format=api_format)
    assert await stream.start() is None
    last = (await read_events(stream)).removesuffix(b"\n\n").split(b"\n\n")[-1]
    assert last.startswith(b"event: error\ndata: {")
    assert json.loads(last.partition(b"data: ")[2])["error"]["code"] == "unavailable"


async def test_a_named_error_event_before_any_other_decides_the_status() -> None:
    failure = await make_stream(NAMED_ERROR_EVENT, error_format=error_format.ANTHROPIC).start()
    assert failure is not None
    assert (failure.status, failure.body["error"]["message"]) == (500, ENGINE_ERROR_MESSAGE)


async def test_a_preamble_that_nothing_follows_starts_the_stream_after_the_keep_alive_time() -> None:
    later = asyncio.Event()
    stream = make_stream(ROLE, later, EVENT_1, DONE, keep_alive=0.01)
    assert await stream.start() is None
    events = stream.events()
    assert await anext(events) == ROLE
    assert await anext(events) == b": keep-alive\n\n"
    later.set()
    rest = [event async for event in events if event != b": keep-alive\n\n"]
    assert b"".join(rest) == EVENT_1 + DONE


SHUTTING_DOWN = b"The gateway is shutting down; retry."


async def test_a_stopped_stream_ends_with_an_error_event() -> None:
    never = asyncio.Event()
    for keep_alive in (0, 60):
        stream = make_stream(EVENT_1, EVENT_2[:5], never, keep_alive=keep_alive)
        assert await stream.start() is None
        events = stream.events()
        assert await anext(events) == EVENT_1
        last = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        for _ in range(2):
            stream.stop()
        event, end, rest = (await asyncio.wait_for(last, 20)).partition(b"\n\n")
        assert json.loads(event.removeprefix(b"data: "))["error"]["message"] == SHUTTING_DOWN.decode()
        assert end + rest == b"\n\n" + DONE
        assert [event async for event in events] == []


async def test_a_stopped_stream_sends_what_has_arrived() -> None:
    never = asyncio.Event()
    stream = make_stream(EVENT_1, EVENT_2, DONE)
    assert await stream.start() is None
    stream.stop()
    assert await read_events(stream) == EVENT_1 + EVENT_2 + DONE, "it is complete, and so without an error"
    stream = make_stream(EVENT_1, EVENT_2, never)
    assert await stream.start() is None
    stream.stop()
    data = await read_events(stream)
    assert data.startswith(EVENT_1 + EVENT_2 + b"data: {")
    assert SHUTTING_DOWN in data


async def test_a_stop_while_a_keep_alive_comment_is_due_is_no_error() -> None:
    never = asyncio.Event()
    stream = make_stream(EVENT_1, never, keep_alive=0.01)
    assert await stream.start() is None
    stopping = asyncio.get_running_loop().call_later(0.01, stream.stop)
    data = await asyncio.wait_for(read_events(stream), 20)
    assert data.replace(b": keep-alive\n\n", b"").startswith(EVENT_1 + b"data: {")
    stopping.cancel()

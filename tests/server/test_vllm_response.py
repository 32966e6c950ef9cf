"""What the language worker's engine says, as the caller gets it."""

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


def vllm(code: Any, message: str = "bad", **changed: Any) -> bytes:
    return json.dumps({"error": {"message": message, "type": "Bad", "param": None, "code": code, **changed}}).encode()


CONTEXT = "This model's maximum context length is 4096 tokens. However, you requested 5000"


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (400, vllm(400), ("bad", "invalid_request_error", None, "invalid_request")),
        (400, vllm(400, param="stop"), ("bad", "invalid_request_error", "stop", "invalid_request")),
        (400, vllm(400, param="input_tokens"), ("bad", "invalid_request_error", "input_tokens", "context_length_exceeded")),
        (400, vllm(400, CONTEXT), (CONTEXT, "invalid_request_error", None, "context_length_exceeded")),
        (401, vllm(401), ("bad", "authentication_error", None, "invalid_api_key")),
        (401, b'{"error": "Unauthorized"}', ('{"error": "Unauthorized"}', "authentication_error", None, "invalid_api_key")),
        (404, vllm(404), ("bad", "invalid_request_error", None, "model_not_found")),
        (404, b'{"detail": "Not Found"}', ("Not Found", "invalid_request_error", None, "model_not_found")),
        (422, vllm(422), ("bad", "invalid_request_error", None, "invalid_request")),
        (429, vllm(429), ("bad", "rate_limit_error", None, "overloaded")),
        (418, b"<html>", ("<html>", "invalid_request_error", None, "invalid_request")),
        (400, b"\xff" * 3, ("\ufffd" * 3, "invalid_request_error", None, "invalid_request")),
        (400, b"[1]", ("[1]", "invalid_request_error", None, "invalid_request")),
        (500, vllm(500, "/root/x.py failed", param="x"), (ENGINE_ERROR_MESSAGE, "server_error", None, "engine_error")),
        (500, b"Internal Server Error at 10.0.0.1", (ENGINE_ERROR_MESSAGE, "server_error", None, "engine_error")),
        (503, b"", (ENGINE_ERROR_MESSAGE, "server_error", None, "engine_error")),
        (500, vllm(500, CONTEXT), (ENGINE_ERROR_MESSAGE, "server_error", None, "engine_error")),
    ],
)
def test_errors_take_openais_shape(status: int, body: bytes, expected: tuple[Any, ...]) -> None:
    made = Failure.parse(status, body)
    assert made.status == status
    assert tuple(made.body["error"][name] for name in ("message", "type", "param", "code")) == expected


class Content:
    """What there is to read: chunks, and then an end, or an error. A chunk that is an event comes when that is set."""

    def __init__(self, *chunks: bytes | asyncio.Event, then: Exception | None = None) -> None:
        self._chunks, self._then = list(chunks), then

    async def readany(self) -> bytes:
        while self._chunks:
            chunk = self._chunks[0]
            if isinstance(chunk, bytes):
                self._chunks.pop(0)
                return chunk
            await chunk.wait()
            self._chunks.pop(0)
        if self._then:
            raise self._then
        return b""


def stream(
    *chunks: bytes | asyncio.Event, then: Exception | None = None, listener: StreamTimer | None = None, **options: Any
) -> EventStream:
    answer: Any = SimpleNamespace(content=Content(*chunks, then=then))
    return EventStream(answer, listener or StreamTimer(Metrics(), RequestStats("request")), **options)


async def everything(made: EventStream) -> bytes:
    return b"".join([chunk async for chunk in made.events()])


A, B, DONE = b'data: {"n": 1}\n\n', b'data: {"n": 2}\n\n', b"data: [DONE]\n\n"
ROLE = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":'
    b'{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"prompt_token_ids":null,"prompt_text":null}\n\n'
)
MESSAGE_START = b'event: message_start\ndata: {"type":"message_start","message":{"id":"m","content":[]}}\n\n'
FAILED = b"data: " + vllm(500, "/root/x.py failed") + b"\n\n"
REFUSED = b"data: " + vllm(400, "too hot") + b"\n\n"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 100])
async def test_bytes_pass_through_however_they_come(size: int) -> None:
    said = A + B + b": a comment\n\n" + DONE
    made = stream(*(said[i : i + size] for i in range(0, len(said), size)))
    assert await made.start() is None
    assert await everything(made) == said


async def test_an_end_in_the_middle_of_an_event_loses_nothing() -> None:
    made = stream(A, B, b"data: {")
    assert await made.start() is None
    assert await everything(made) == A + B + b"data: {"


@pytest.mark.parametrize("before", [b"", ROLE, ROLE + ROLE.replace(b'"index":0', b'"index":1'), MESSAGE_START])
@pytest.mark.parametrize("size", [1, 10, 1000])
async def test_an_error_after_the_preamble_decides_the_status(before: bytes, size: int) -> None:
    said = before + FAILED + DONE
    failure = await stream(*(said[i : i + size] for i in range(0, len(said), size))).start()
    assert failure is not None
    assert failure.status == 500
    assert failure.body["error"]["message"] == ENGINE_ERROR_MESSAGE
    said = before + REFUSED + DONE
    failure = await stream(*(said[i : i + size] for i in range(0, len(said), size))).start()
    assert failure is not None
    assert failure.status == 400
    assert failure.body["error"]["message"] == "too hot"


@pytest.mark.parametrize("code", [None, "x", 0, 200, 99999, [], {}])
async def test_an_error_with_a_strange_code_is_ours(code: Any) -> None:
    failure = await stream(b"data: " + vllm(code) + b"\n\n").start()
    assert failure is not None
    assert failure.status == 500


@pytest.mark.parametrize("chunks", [(), (ROLE,), (A[:5],), (MESSAGE_START,)])
@pytest.mark.parametrize("error", [aiohttp.ClientPayloadError(), aiohttp.ServerDisconnectedError()])
async def test_a_break_before_anything_went_out_can_be_tried_elsewhere(chunks: tuple[bytes, ...], error: Exception) -> None:
    with pytest.raises(errors.Unavailable):
        await stream(*chunks, then=error).start()


async def test_an_end_before_any_event_can_be_tried_elsewhere() -> None:
    for chunks in ((), (ROLE,), (MESSAGE_START,)):
        with pytest.raises(errors.WorkerUnavailable):
            await stream(*chunks).start()


@pytest.mark.parametrize("preamble", [ROLE, MESSAGE_START], ids=["chat", "messages"])
async def test_the_preamble_waits_for_the_next_event_however_late(preamble: bytes) -> None:
    later = asyncio.Event()
    made = stream(preamble, later, A, DONE)
    starting = asyncio.create_task(made.start())
    await asyncio.wait([starting], timeout=0.1)
    assert not starting.done()
    later.set()
    assert await starting is None
    assert await everything(made) == preamble + A + DONE


@pytest.mark.parametrize(
    "event",
    [
        ROLE.replace(b'"content":""', b'"content":"a"'), ROLE.replace(b'"finish_reason":null', b'"finish_reason":"stop"'),
        b'event: response.created\ndata: {}\n\n', b'data: {"choices":[{"text":"a"}]}\n\n', DONE,
    ],
)  # fmt: skip
async def test_every_other_event_starts_the_stream_at_once(event: bytes) -> None:
    never = asyncio.Event()
    assert await asyncio.wait_for(stream(event, never).start(), 20) is None


async def test_a_first_event_does_not_wait_for_a_second() -> None:
    later = asyncio.Event()
    made = stream(A, B[:5], later, B[5:], DONE)
    assert await made.start() is None
    events = made.events()
    assert await anext(events) == A
    later.set()
    assert b"".join([event async for event in events]) == B + DONE


async def test_one_event_is_a_whole_answer() -> None:
    made = stream(A)
    assert await made.start() is None
    assert await everything(made) == A


@pytest.mark.parametrize("size", [1, 9, 1000])
async def test_a_late_error_says_nothing_of_the_engines_inside(size: int) -> None:
    late = B + FAILED + DONE
    made = stream(A, B, *(late[i : i + size] for i in range(0, len(late), size)))
    assert await made.start() is None
    events = (await everything(made)).split(b"\n\n")
    assert events[:3] == [A[:-2], B[:-2], B[:-2]]
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
async def test_a_late_break_is_told(error: Exception, code: str) -> None:
    made = stream(A, B, b"data: {half", then=error)
    assert await made.start() is None
    said = await everything(made)
    events = said.split(b"\n\n")
    assert events[:2] == [A[:-2], B[:-2]]
    assert json.loads(events[2].removeprefix(b"data: "))["error"]["code"] == code
    assert events[3:] == [b"data: [DONE]", b""]


CHAT = b'"usage":{"prompt_tokens":9,"total_tokens":12,"prompt_tokens_details":%s}'
RESPONSES = b'"usage":{"input_tokens":9,"input_tokens_details":{"cached_tokens":4},"output_tokens":3}'
COUNTED = {
    "details": (CHAT % b'{"cached_tokens":4}', CHAT % b'{"cached_tokens":4,"image_tokens":7}'),
    "no details": (CHAT % b"null", CHAT % b'{"image_tokens":7}'),
    "a name less": (b'"usage":{"prompt_tokens":9}', b'"usage":{"prompt_tokens":9,"prompt_tokens_details":{"image_tokens":7}}'),
    "responses": (RESPONSES, RESPONSES.replace(b'"cached_tokens":4', b'"cached_tokens":4,"image_tokens":7')),
}


@pytest.mark.parametrize(("said", "made"), COUNTED.values(), ids=COUNTED)
def test_visual_tokens_are_counted_in_usage_and_nothing_else_changes(said: bytes, made: bytes) -> None:
    around = b'{"text":"\\u00e9 \xc3\xa9 \\"usage\\":{\\"prompt_tokens\\":1}","x":1.50, %s ,"y":[ ]}'
    assert add_image_tokens(around % said, 7) == around % made
    assert add_image_tokens(around % said + around % said, 7) == around % made + around % made


NOT_COUNTED = {
    "null": b'{"usage":null}',
    "anthropic": b'{"usage":{"input_tokens":9,"output_tokens":3}}',
    "the schema of a tool": b'{"usage":{"type":"object","properties":{"prompt_tokens":{"type":"integer"}}}}',
    "a schema of such a name": b'{"usage":{"prompt_tokens":{"type":"integer"}}}',
    "true": b'{"usage":{"prompt_tokens":true}}',
    "cut": b'{"usage":{"prompt_tokens":9',
    "no JSON": b'{"usage":{prompt_tokens:9}}',
    "deep": b'{"usage":{"prompt_tokens":' + b"[" * 4000 + b"9" + b"]" * 4000 + b"}}",
    "half a character": b'{"usage":{"a":"' + b"\xe2\x82\xac" * 3000 + b'"}}',
    "no UTF-8": b'{"usage":{"a":"\xff"}}',
}


@pytest.mark.parametrize("said", NOT_COUNTED.values(), ids=NOT_COUNTED)
def test_what_counts_no_prompt_stays_as_it_is(said: bytes) -> None:
    assert add_image_tokens(said, 7) == said


@pytest.mark.parametrize("size", [1, 20, 1000])
async def test_a_stream_counts_visual_tokens_wherever_usage_comes(size: int) -> None:
    usage = b'"usage":{"prompt_tokens":9,"completion_tokens":%d}'
    said = b"".join(b"data: {%s}\n\n" % (usage % n) for n in range(3)) + A + b'data: {"usage":null}\n\n' + DONE
    made = stream(*(said[i : i + size] for i in range(0, len(said), size)), image_tokens=7)
    assert await made.start() is None
    assert await everything(made) == said.replace(b"}}", b',"prompt_tokens_details":{"image_tokens":7}}}')


async def test_without_images_nothing_is_said_of_them() -> None:
    said = b'data: {"usage":{"prompt_tokens":9}}\n\n'
    made = stream(said)
    assert await made.start() is None
    assert await everything(made) == said


async def test_a_silent_stream_says_that_it_lives() -> None:
    later = asyncio.Event()
    made = stream(A, B[:5], later, B[5:], DONE, keep_alive=0.01)
    assert await made.start() is None
    events = made.events()
    assert await anext(events) == A
    assert [await anext(events) for _ in range(3)] == [b": keep-alive\n\n"] * 3
    later.set()
    rest = [event async for event in events if event != b": keep-alive\n\n"]
    assert b"".join(rest) == B + DONE, "what had come of an event is not lost"


async def test_the_requests_own_time_is_no_silence() -> None:
    made = stream(A, B, then=TimeoutError(), keep_alive=60)
    assert await made.start() is None
    said = await everything(made)
    assert b"deadline_exceeded" in said
    assert b"keep-alive" not in said


NAMED = b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"/root/x.py failed"}}\n\n'


@pytest.mark.parametrize("shape", [error_format.OPENAI_RESPONSES, error_format.ANTHROPIC], ids=["responses", "messages"])
async def test_apis_whose_events_have_names_have_errors_with_names(shape: error_format.ErrorFormat) -> None:
    start = b"event: content_block_start\ndata: {}\n\n"
    made = stream(start, start, start + NAMED, error_format=shape)
    assert await made.start() is None
    events = (await everything(made)).split(b"\n\n")
    assert events[:3] == [start[:-2]] * 3
    assert events[4:] == [b""]
    name, _, data = events[3].partition(b"\n")
    said = json.loads(data.removeprefix(b"data: "))
    assert (name, said["type"], said["error"]["message"]) == (b"event: error", "error", ENGINE_ERROR_MESSAGE)
    assert said["error"]["type"] == ("api_error" if shape is error_format.ANTHROPIC else "server_error")
    made = stream(start, start, then=aiohttp.ClientPayloadError(), error_format=shape)
    assert await made.start() is None
    last = (await everything(made)).removesuffix(b"\n\n").split(b"\n\n")[-1]
    assert last.startswith(b"event: error\ndata: {")
    assert json.loads(last.partition(b"data: ")[2])["error"]["code"] == "unavailable"


async def test_a_named_error_at_once_is_no_beginning() -> None:
    failure = await stream(NAMED, error_format=error_format.ANTHROPIC).start()
    assert failure is not None
    assert (failure.status, failure.body["error"]["message"]) == (500, ENGINE_ERROR_MESSAGE)

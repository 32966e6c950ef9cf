"""Chat completions: what reaches the workers, and what the client receives."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tests.server.fakes.file_server import file_server
from tests.server.fakes.handlers import event_stream, respond_with
from tests.server.fakes.requests import chat, image_file, image_part, text_part
from tests.server.fakes.stack import Stack, start_stack
from tests.server.fakes.vision_worker import visual_token_count
from tests.server.fakes.vllm import COMPLETION, MODEL
from tests.server.gateway.helpers import A, B, C, message_content, placeholder


async def test_a_text_request_and_its_response_pass_byte_for_byte(stack: Stack) -> None:
    body = b'{ "messages" : [{"role":"user","content":"\\u00e9 \xc3\xa9"}],"model":"internvl" , "x": 1.50}\n'
    response = await stack.post(body)
    assert (response.status, response.body) == (200, COMPLETION)
    assert response.headers["Content-Type"] == "application/json"
    assert stack.engine.requests[-1].unsalted == body
    assert stack.engine.requests[-1].path == "/v1/chat/completions"
    assert stack.vision.calls == []
    assert "X-DvD-Images" not in response.headers


async def test_an_image_goes_to_the_vision_worker_and_its_key_to_the_engine(stack: Stack) -> None:
    response = await stack.chat(image_part(A), text_part("what is it?"), temperature=0.5, unknown={"a": [1, None]})
    assert (response.status, response.body) == (200, COMPLETION)
    (call,) = stack.vision.calls
    (image,) = call.images
    assert image.data == A
    assert (call.deliver_to, call.fingerprint, call.dtype) == (stack.sink.address, "f" * 64, 3)
    assert stack.sink.rows == {image.key: visual_token_count(A)}
    part, text = message_content(stack)
    assert part == placeholder(A, {"uuid": image.key})
    assert text == text_part("what is it?")
    body = stack.engine.last_json()
    assert (body["temperature"], body["unknown"], body["model"]) == (0.5, {"a": [1, None]}, MODEL)
    assert b"base64" not in stack.engine.requests[-1].raw
    assert (
        response.headers["X-DvD-Images"]
        == f"images=1; tiles=2; compressed=1; tokens={visual_token_count(A)}; reused=0; shared=0; encoded=1"
    )


@pytest.mark.parametrize("scope", ["image", "request"])
async def test_images_in_several_turns_keep_their_places(tmp_path: Path, scope: str) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [image_part(A), text_part("one"), image_part(B)]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [text_part("two"), image_part(C), image_part(A)]},
    ]
    async with start_stack(tmp_path, router_scope=scope) as stack:
        response = await stack.post({"model": MODEL, "messages": messages, "seed": 5})
        assert response.status == 200
        kinds = {image.key: image.data for call in stack.vision.calls for image in call.images}
        first, second = message_content(stack, 1), message_content(stack, 3)
        assert [kinds[part["uuid"]] for part in (first[0], first[2], second[1], second[2])] == [A, B, C, A]
        assert first == [placeholder(A, first[0]), text_part("one"), placeholder(B, first[2])]
        assert second == [text_part("two"), placeholder(C, second[1]), placeholder(A, second[2])]
        assert [message_content(stack, 0), message_content(stack, 2)] == ["be brief", "yes"]
        if scope == "image":
            assert sorted(stack.vision.images) == sorted([A, B, C]), "equal images are encoded once"
            assert first[0]["uuid"] == second[2]["uuid"]
        else:
            assert stack.vision.images == [A, B, C, A], "one call, since all are routed as a group"
        again = await stack.post({"model": MODEL, "messages": messages})
        assert again.headers["X-DvD-Images"].endswith("reused=4; shared=0; encoded=0")


async def test_images_are_fetched_from_urls(stack: Stack) -> None:
    async with file_server(a=respond_with(A), b=respond_with(B, Content_Type="text/plain")) as url:
        response = await stack.chat(image_part(f"{url}/a"), image_part(f"{url}/b"), image_part(f"{url}/a"))
        assert response.status == 200
    assert sorted(stack.vision.images) == sorted([A, B])
    assert url.encode() not in stack.engine.requests[-1].raw


async def test_a_response_that_is_not_json_passes_unchanged(stack: Stack) -> None:
    stack.engine.respond = respond_with(b"\xff\x00 not JSON", Content_Type="application/json")
    response = await stack.chat("a")
    assert (response.status, response.body) == (200, b"\xff\x00 not JSON")


@pytest.mark.parametrize("content", [["a"], [image_part(A), "a"]], ids=["text", "image"])
async def test_fields_that_are_null_are_absent_for_vllm(stack: Stack, content: list[Any]) -> None:
    assert (await stack.chat(*content, n=None, min_tokens=None, vir=None, top_p=0.5)).status == 200
    forwarded = json.loads(stack.engine.requests[-1].raw)
    assert None not in forwarded.values()
    assert forwarded["top_p"] == 0.5


async def test_a_large_image_is_delivered_completely(stack: Stack) -> None:
    data = A + bytes(8 << 20)
    assert (await stack.chat(image_part(data))).status == 200
    assert stack.vision.images == [data]


async def test_a_large_response_is_delivered_completely(stack: Stack) -> None:
    body = b'{"logprobs": "' + base64.b64encode(bytes(3 << 20)) + b'"}'
    stack.engine.respond = respond_with(body, Content_Type="application/json")
    assert (await stack.chat("a")).body == body
    event = b"data: " + body + b"\n\n"
    stack.engine.respond = event_stream(event, event)
    assert (await stack.chat("a", stream=True)).body == event * 2


async def test_a_model_that_the_engine_added_after_its_start_is_found(stack: Stack) -> None:
    stack.engine.models = {"data": [{"id": MODEL}, {"id": "adapter"}]}
    assert (await stack.post({**chat("a"), "model": "adapter"})).status == 200


@pytest.mark.parametrize("model", ["", "../internvl", "internvl ", "Internvl", "x" * 100_000, "a\u0000b", "é"])
async def test_an_unknown_model_is_rejected_before_any_work(stack: Stack, model: str) -> None:
    for content in (["hello"], [image_part(A)]):
        response = await stack.post({**chat(*content), "model": model})
        assert response.status == 404
        assert (response.error["code"], response.error["param"]) == ("model_not_found", "model")
        assert len(response.body) < 3000
    assert stack.vision.calls == []
    assert stack.engine.requests == []


async def test_a_model_of_one_language_worker_is_requested_from_that_worker(tmp_path: Path) -> None:
    async with start_stack(tmp_path, language=2) as stack:
        stack.language_workers[1].engine.models = {"data": [{"id": MODEL}, {"id": "adapter"}]}
        for i in range(10):
            assert (await stack.post({**chat(image_part(image_file(i))), "model": "adapter"})).status == 200
            assert (await stack.post({**chat("a"), "model": "adapter"})).status == 200
        assert stack.language_workers[0].engine.requests == []

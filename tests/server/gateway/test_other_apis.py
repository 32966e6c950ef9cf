"""Completions, Responses, Messages and tokenization, and the visual tokens in `usage`."""

import base64
import json
from pathlib import Path

from common.embedding_ref import parse_embedding_url
from protos import vision_pb2 as pb
from tests.server.fakes.handlers import error_response, event_stream
from tests.server.fakes.requests import chat, data_url, image_part, text_part
from tests.server.fakes.stack import Stack, start_stack
from tests.server.fakes.vision_worker import visual_token_count
from tests.server.fakes.vllm import COMPLETION, EVENTS, MODEL
from tests.server.gateway.helpers import A, message_content, placeholder, respond_with_json


async def test_completions_take_text_only(stack: Stack) -> None:
    response = await stack.post(body := b'{"model":"internvl", "prompt": "once"}', path="/v1/completions")
    assert (response.status, response.body) == (200, COMPLETION)
    assert (stack.engine.requests[-1].path, stack.engine.requests[-1].unsalted) == ("/v1/completions", body)
    assert (await stack.post({"model": MODEL, "prompt": "a", "vir": {}}, path="/v1/completions")).status == 200
    assert stack.engine.last_json() == {"model": MODEL, "prompt": "a"}
    response = await stack.post({"model": MODEL, "prompt_embeds": "AAAA"}, path="/v1/completions")
    assert (response.status, response.error["param"]) == (400, "prompt_embeds")


def assert_embedding_url(image: bytes, url: str) -> None:
    """Asserts that `url` refers to the embedding of an image, for APIs whose parts cannot hold an embedding."""
    reference = parse_embedding_url(url)
    assert reference is not None
    assert reference.tokens == visual_token_count(image)


async def test_responses_take_images(stack: Stack) -> None:
    completion = b'{"id":"resp_1","usage":{"input_tokens":9,"input_tokens_details":{"cached_tokens":0},"output_tokens":1}}'
    stack.engine.respond = respond_with_json(completion)
    part = {"type": "input_image", "image_url": data_url(A), "detail": "low"}
    messages = [{"role": "user", "content": [part, {"type": "input_text", "text": "what is it?"}]}]
    response = await stack.post({"model": MODEL, "input": messages, "vir": {"mode": "off"}}, path="/v1/responses")
    assert (response.status, stack.engine.requests[-1].path) == (200, "/v1/responses")
    details = b'{"cached_tokens":0,"image_tokens":%d}' % visual_token_count(A)
    assert response.body == completion.replace(b'{"cached_tokens":0}', details)
    assert response.headers["X-DvD-Images"].startswith("images=1; ")
    assert (stack.vision.calls[-1].tiling.max_tiles, stack.vision.calls[-1].router.mode) == (1, pb.Router.OFF)
    body = stack.engine.last_json()
    assert_embedding_url(A, body["input"][0]["content"][0]["image_url"])
    assert "vir" not in body
    assert (await stack.post({"model": MODEL, "input": "a"}, path="/v1/responses")).body == completion


async def test_messages_take_images(stack: Stack) -> None:
    completion = b'{"id":"msg_1","type":"message","usage":{"input_tokens":9,"output_tokens":1}}'
    stack.engine.respond = respond_with_json(completion)
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(A).decode()}
    messages = [{"role": "user", "content": [{"type": "image", "source": source}, text_part("what is it?")]}]
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        response = await stack.post({"model": MODEL, "max_tokens": 5, "messages": messages}, path=path)
        assert (response.status, response.body) == (200, completion), "Anthropic's usage has no field for visual tokens"
        assert stack.engine.requests[-1].path == path
        assert_embedding_url(A, message_content(stack)[0]["source"]["url"])
    assert stack.vision.images == [A]
    text = json.dumps({"model": MODEL, "max_tokens": 5, "messages": [{"role": "user", "content": "a"}]}).encode()
    assert (await stack.post(text, path="/v1/messages")).status == 200
    assert stack.engine.requests[-1].unsalted == text


async def test_messages_use_anthropics_error_format_and_api_key_header(tmp_path: Path) -> None:
    body = {"model": MODEL, "max_tokens": 5, "messages": [{"role": "user", "content": "a"}]}
    async with start_stack(tmp_path, api_key="secret") as stack:
        response = await stack.post(body, path="/v1/messages")
        assert response.status == 401
        assert (response.json["type"], response.json["error"]["type"]) == ("error", "authentication_error")
        key = {"x-api-key": "secret"}
        assert (await stack.post(body, key, path="/v1/messages")).status == 200
        response = await stack.post({**body, "messages": 5, "model": "other"}, key, path="/v1/messages")
        assert response.status == 404
        assert (response.json["type"], response.json["error"]["type"]) == ("error", "not_found_error")
        stack.engine.respond = error_response(400, "max_tokens must be positive")
        response = await stack.post(body, key, path="/v1/messages")
        assert (response.status, response.json["error"]["message"]) == (400, "max_tokens must be positive")
        assert (response.json["type"], response.json["error"]["type"]) == ("error", "invalid_request_error")


async def test_tokenize_and_detokenize_are_forwarded(stack: Stack) -> None:
    response = await stack.post(chat(image_part(A), text_part("a")), path="/tokenize")
    assert (response.status, stack.engine.requests[-1].path) == (200, "/tokenize")
    assert message_content(stack)[0] == placeholder(A, message_content(stack)[0])
    for path, body in (("/tokenize", {"model": MODEL, "prompt": "a"}), ("/detokenize", {"model": MODEL, "tokens": [1]})):
        raw = json.dumps(body).encode()
        assert (await stack.post(raw, path=path)).status == 200
        assert (stack.engine.requests[-1].path, stack.engine.requests[-1].unsalted) == (path, raw)


async def test_usage_counts_visual_tokens_in_responses_and_in_streams(stack: Stack) -> None:
    body = b'{"usage":{"prompt_tokens":9,"prompt_tokens_details":{"cached_tokens":4}},"x": 1.50}'
    with_images = body.replace(b'"cached_tokens":4', b'"cached_tokens":4,"image_tokens":%d' % (2 * visual_token_count(A)))
    stack.engine.respond = respond_with_json(body)
    assert (await stack.chat(image_part(A), image_part(A))).body == with_images
    assert (await stack.chat("a")).body == body
    stack.engine.respond = event_stream(EVENTS[0], EVENTS[1], b"data: " + body + b"\n\n", EVENTS[-1])
    response = await stack.chat(image_part(A), image_part(A), stream=True)
    assert response.body == EVENTS[0] + EVENTS[1] + b"data: " + with_images + b"\n\n" + EVENTS[-1]
    response = await stack.chat("a", stream=True)
    assert response.body == EVENTS[0] + EVENTS[1] + b"data: " + body + b"\n\n" + EVENTS[-1]

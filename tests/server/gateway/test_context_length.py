"""Requests that cannot fit the model's context: they are rejected before anything is encoded."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.server.fakes.requests import chat, data_url, image_file, image_part, text_part
from tests.server.fakes.stack import Stack, start_stack
from tests.server.fakes.vision_worker import checkpoint_description
from tests.server.fakes.vllm import MODEL
from tests.server.fakes.waiting import wait_until
from tests.server.gateway.helpers import A

CONTEXT = 2048
WIDE = image_file(0, (448 * 4, 448))
"""An image of five tiles, its thumbnail counted: 1280 visual tokens, or 320 if all of them are compressed."""


@pytest.fixture(scope="module")
async def small_stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """A gateway whose model has a context of 2048 tokens."""
    async with start_stack(tmp_path_factory.mktemp("context")) as running:
        running.engine.models["data"][0]["max_model_len"] = CONTEXT

        async def is_known() -> bool:
            return (await running.chat("a", max_tokens=CONTEXT + 1)).status == 400

        await wait_until(is_known, "the gateway knows the model's context")
        yield running


def wide(**options: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(WIDE), **options}}


OFF, ALL = {"mode": "off"}, {"mode": "all"}
TOO_MANY: dict[str, tuple[list[Any], int, str]] = {
    "router off": ([wide(vir=OFF)] * 2, 2560, '"auto"'),
    "compressed": ([wide(vir=ALL)] * 7, 2240, "fewer"),
    "auto may compress": ([wide()] * 7, 2240, "max_dynamic_patch"),
    "one with many tiles": ([image_part(image_file(0, (448 * 6, 448 * 2)))] * 3, 3 * 13 * 64, "max_dynamic_patch"),
}


@pytest.mark.parametrize(("parts", "tokens", "hint"), TOO_MANY.values(), ids=TOO_MANY)
async def test_images_that_exceed_the_context_are_rejected_before_they_are_encoded(
    small_stack: Stack, parts: list[Any], tokens: int, hint: str
) -> None:
    response = await small_stack.chat(*parts, text_part("?"))
    assert (response.status, response.error["code"], response.error["param"]) == (400, "context_length_exceeded", "messages")
    message = response.error["message"]
    assert f"{len(parts)} image" in message
    assert str(tokens) in message
    assert str(CONTEXT) in message
    assert hint in message
    assert small_stack.vision.calls == []


async def test_images_are_counted_in_every_api(small_stack: Stack) -> None:
    part = {"type": "input_image", "image_url": data_url(WIDE), "vir": OFF}
    body = {"model": MODEL, "input": [{"role": "user", "content": [part] * 2}]}
    response = await small_stack.post(body, path="/v1/responses")
    assert (response.status, response.error["code"], response.error["param"]) == (400, "context_length_exceeded", "input")
    assert small_stack.vision.calls == []


async def test_images_that_may_fit_are_served(small_stack: Stack) -> None:
    for parts in ([wide(vir=OFF)], [wide()] * 6, [wide(detail="low", vir=OFF)] * 8, [wide(max_dynamic_patch=1, vir=OFF)] * 8):
        assert (await small_stack.chat(*parts)).status == 200
    small_stack.vision.calls.clear()


async def test_the_router_is_no_hint_for_a_model_without_one(small_stack: Stack) -> None:
    without = checkpoint_description(compressed_tokens_per_tile=0)
    small_stack.vision.checkpoint = small_stack.sink.checkpoint = without

    async def is_hint(is_there: bool) -> bool:
        error = (await small_stack.chat(wide(vir=OFF), wide(vir=OFF))).error
        return error["code"] == "context_length_exceeded" and ("vir" in error["message"]) == is_there

    await wait_until(lambda: is_hint(False), "the message does not name the router")
    small_stack.vision.checkpoint = small_stack.sink.checkpoint = checkpoint_description()
    await wait_until(lambda: is_hint(True), "the message names the router")


MESSAGES = chat("a")["messages"]
MAXIMA: dict[str, tuple[str, dict[str, Any], str]] = {
    "chat": ("/v1/chat/completions", {"messages": MESSAGES}, "max_completion_tokens"),
    "chat, older": ("/v1/chat/completions", {"messages": MESSAGES}, "max_tokens"),
    "completions": ("/v1/completions", {"prompt": "a"}, "max_tokens"),
    "responses": ("/v1/responses", {"input": "a"}, "max_output_tokens"),
    "messages": ("/v1/messages", {"messages": MESSAGES}, "max_tokens"),
}


@pytest.mark.parametrize(("path", "fields", "name"), MAXIMA.values(), ids=MAXIMA)
async def test_a_response_longer_than_the_context_is_rejected(
    small_stack: Stack, path: str, fields: dict[str, Any], name: str
) -> None:
    before = len(small_stack.engine.requests)
    response = await small_stack.post({"model": MODEL, **fields, name: CONTEXT + 1}, path=path)
    error = response.json["error"]
    assert (response.status, error["code"], error["param"]) == (400, "context_length_exceeded", name)
    assert f"{name} {CONTEXT + 1} exceeds" in error["message"]
    assert len(small_stack.engine.requests) == before
    assert (await small_stack.post({"model": MODEL, **fields, name: CONTEXT}, path=path)).status == 200


@pytest.mark.parametrize(("path", "fields", "name"), MAXIMA.values(), ids=MAXIMA)
async def test_a_negative_length_of_a_response_is_rejected_by_the_name_that_its_caller_uses(
    small_stack: Stack, path: str, fields: dict[str, Any], name: str
) -> None:
    before = len(small_stack.engine.requests)
    response = await small_stack.post({"model": MODEL, **fields, name: -1}, path=path)
    error = response.json["error"]
    assert (response.status, error["code"], error["param"]) == (400, "invalid_request", name)
    assert error["message"] == f"{name} is -1: expected a whole number from 1 to {CONTEXT}."
    assert len(small_stack.engine.requests) == before


async def test_only_the_field_that_counts_is_checked(small_stack: Stack) -> None:
    assert (await small_stack.chat("a", max_completion_tokens=5, max_tokens=10**6)).status == 200
    assert (await small_stack.chat("a", max_output_tokens=10**6)).status == 200
    assert (await small_stack.post({**chat("a"), "max_tokens": 10**6}, path="/tokenize")).status == 200


async def test_without_a_known_context_vllm_decides(stack: Stack) -> None:
    assert (await stack.chat(*[image_part(A)] * 32, max_tokens=10**9)).status == 200

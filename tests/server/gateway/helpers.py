"""Images, assertions and small functions that several test modules use."""

import asyncio
from typing import Any

from tests.server.fakes.handlers import Handler, abort_connection, event_stream, partial_body, respond_with
from tests.server.fakes.requests import image_file, image_part, text_part
from tests.server.fakes.stack import Stack
from tests.server.fakes.vision_worker import visual_token_count
from tests.server.fakes.vllm import COMPLETION

A, B, C = (image_file(i) for i in range(3))
"""Three different image files."""

ERROR_EVENT = b'data: {"error": {"message": "/root/model.py failed", "type": "X", "param": null, "code": 500}}\n\n'
"""An error in vLLM's format, as a server-sent event."""

BROKEN_RESPONSES: dict[str, Handler] = {
    "no head": abort_connection,
    "partial body": partial_body,
    "no event": event_stream(then=abort_connection),
}
"""Handlers that break the connection before the response is complete, or before its first event."""


async def assert_serves_images(stack: Stack) -> None:
    """Asserts that a request with an image is served, and waits until none is in flight."""
    response = await stack.chat(image_part(A), text_part("what is it?"))
    assert (response.status, response.body) == (200, COMPLETION)
    await stack.wait_until_idle()


def message_content(stack: Stack, message: int = 0) -> Any:
    """Returns the content of a message of the last request as the engine received it."""
    return stack.engine.last_json()["messages"][message]["content"]


def placeholder(image: bytes, part: dict[str, Any]) -> dict[str, Any]:
    """Returns the part that stands for an image in the request to the engine, with the key of `part`."""
    token_count = visual_token_count(image)
    return {"type": "image_embeds", "image_embeds": {"image_num_tokens": [token_count]}, "uuid": part["uuid"]}


def respond_with_json(body: bytes) -> Handler:
    """Responds with this JSON document."""
    return respond_with(body, Content_Type="application/json")


async def read_to_end(reader: asyncio.StreamReader) -> bytes:
    """Reads all that the gateway sends until it closes the connection."""
    async with asyncio.timeout(20):
        return await reader.read()

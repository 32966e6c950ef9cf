"""Request bodies that are rejected, and that the next request is served nevertheless."""

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.server.fakes.requests import chat, data_url, image_file, image_part
from tests.server.fakes.stack import Stack
from tests.server.fakes.vllm import MODEL
from tests.server.gateway.helpers import A, assert_serves_images


def chat_with_url(url: str) -> dict[str, Any]:
    return chat(image_part(url), "hello")


INVALID_REQUESTS: dict[str, tuple[Any, str]] = {
    "empty body": (b"", "invalid_request"),
    "not JSON": (b"hello", "invalid_request"),
    "array": (b"[]", "invalid_request"),
    "null": (b"null", "invalid_request"),
    "not UTF-8": (b'{"model": "\xff"}', "invalid_request"),
    "lone surrogate": (rb'{"model": "internvl", "messages": [{"role": "user", "content": "\ud800"}]}', "invalid_request"),
    "lone surrogate beside an image": (
        json.dumps(chat(image_part(A), "é"), ensure_ascii=False).replace("é", "é\\ud800").encode(), "invalid_request"
    ),
    "NaN": (json.dumps(chat("a", temperature=float("nan"))).encode(), "invalid_request"),
    "1e400": (json.dumps(chat("a")).encode()[:-1] + b', "seed": 1e400}', "invalid_request"),
    "deep": (b'{"a":' * 100_000, "invalid_request"),
    "deep model": (b'{"model": ' + b"[" * 900 + b"]" * 900 + b"}", "invalid_request"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(100), "invalid_request"),
    "no messages": ({"model": MODEL}, "invalid_request"),
    "empty messages": ({"model": MODEL, "messages": []}, "invalid_request"),
    "part without type": (chat({"text": "a"}, "b"), "invalid_request"),
    "type is a list": (chat({"type": []}, "b"), "invalid_request"),
    "audio": (chat({"type": "audio_url", "audio_url": {"url": "https://example.org"}}, "b"), "invalid_request"),
    "key of another client's image": (
        chat({"type": "image_embeds", "image_embeds": {"image_num_tokens": [1]}, "uuid": "a" * 64}, "b"), "invalid_request"
    ),
    "model is a number": ({**chat("a"), "model": 5}, "invalid_request"),
    "template": ({**chat("a"), "chat_template": "{{ 7 }}"}, "invalid_request"),
    "code": ({**chat("a"), "mm_processor_kwargs": {"code_revision": "main"}}, "invalid_request"),
    "router": (chat(image_part(A), vir={"mode": "on"}), "invalid_request"),
    "router for a text": (chat("a", vir="on"), "invalid_request"),
    "image as a list": (chat({"type": "image_url", "image_url": ["https://example.org/a"]}, "b"), "invalid_request"),
    "integer of 71 bits": (chat("a", top_k=2**70), "invalid_request"),
    "echo of an image": (chat(image_part(A), echo=True, add_generation_prompt=False), "invalid_request"),
    "URL null": (chat({"type": "image_url", "image_url": {"url": None}}, "b"), "invalid_request"),
    "file": (chat_with_url("file:///etc/passwd"), "invalid_request"),
    "http": (chat_with_url("http://example.org/a.png"), "invalid_request"),
    "loopback": (chat_with_url("https://127.0.0.1/a.png"), "invalid_request"),
    "decimal": (chat_with_url("https://2130706433/a.png"), "invalid_request"),
    "metadata": (chat_with_url("https://169.254.169.254/latest/meta-data"), "invalid_request"),
    "mapped": (chat_with_url("https://[::ffff:127.0.0.1]/a.png"), "invalid_request"),
    "localhost": (chat_with_url("https://localhost:1/a.png"), "invalid_request"),
    "data without base64": (chat_with_url("data:image/png,AAAA"), "invalid_image"),
    "data empty": (chat_with_url("data:image/png;base64,"), "invalid_image"),
    "data garbage": (chat_with_url("data:image/png;base64,!!!!"), "invalid_image"),
    "not an image": (chat_with_url(data_url(b"hello")), "invalid_image"),
    "only magic": (chat_with_url(data_url(b"\x89PNG\r\n\x1a\n")), "invalid_image"),
    "too many bytes": (chat_with_url(data_url(A + bytes(100_000))), "image_too_large"),
    "too many pixels": (chat_with_url(data_url(image_file(0, (101, 100)))), "image_too_large"),
    "5 images": (chat(*[image_part(A)] * 5), "too_many_images"),
    "999 images": (chat(*[image_part(A)] * 999), "too_many_images"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "code"), INVALID_REQUESTS.values(), ids=INVALID_REQUESTS)
async def test_an_invalid_request_is_rejected_and_the_next_valid_one_served(shared_stack: Stack, body: Any, code: str) -> None:
    before = len(shared_stack.engine.requests)
    response = await shared_stack.post(body)
    assert response.status == 400
    assert response.error["code"] == code
    assert response.error["type"] == "invalid_request_error"
    assert len(response.body) < 1000
    assert len(shared_stack.engine.requests) == before
    await assert_serves_images(shared_stack)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [(1 << 20) + 1, 3 << 19])
async def test_a_body_over_the_limit_is_rejected(shared_stack: Stack, size: int, chunked: bool) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b" " * (size // 2)
        yield b" " * (size - size // 2)

    response = await shared_stack.request("POST", "/v1/chat/completions", data=pieces() if chunked else io.BytesIO(b" " * size))
    assert (response.status, response.error["code"]) == (413, "body_too_large")
    await assert_serves_images(shared_stack)


async def test_an_endless_body_is_not_read_for_ever(shared_stack: Stack) -> None:
    reader, writer = await shared_stack.send_raw("POST /v1/chat/completions HTTP/1.1\nHost: a\nTransfer-Encoding: chunked\n\n")
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(20):
            while not reader.at_eof() and not writer.is_closing():
                writer.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
                await writer.drain()
                if reader._buffer:  # type: ignore[attr-defined]  # it may respond and keep the connection open
                    assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
                    break
    writer.transport.abort()
    await assert_serves_images(shared_stack)


async def test_a_body_just_within_the_limit_is_served(shared_stack: Stack) -> None:
    body = json.dumps(chat("a")).encode()
    assert (await shared_stack.post(body + b" " * ((1 << 20) - len(body)))).status == 200


@pytest.mark.parametrize("kind", ["text/plain", "", "multipart/form-data; boundary=x", "application/json; charset=latin-1"])
async def test_the_content_type_of_a_request_is_ignored(shared_stack: Stack, kind: str) -> None:
    assert (await shared_stack.post(chat("a"), {"Content-Type": kind})).status == 200

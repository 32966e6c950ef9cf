"""Anthropic's documents: those with text are passed as text, others are rejected with their place."""

import json
from typing import Any

import pytest

from common import errors
from server.apis import messages
from server.apis.image_options import RequestPolicy

parse_messages = messages.APIS[0].parse


def parsed_content(*blocks: Any) -> list[Any]:
    """Returns the blocks of a user message as vLLM gets them."""
    body = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": list(blocks)}]}
    request = parse_messages(json.dumps(body).encode(), RequestPolicy(2))
    content: list[Any] = json.loads(request.with_embeddings([], []))["messages"][0]["content"]
    return content


def document(source: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "document", "source": source, **fields}


TEXT = {"type": "text", "media_type": "text/plain", "data": "It rains."}
TEXTS: dict[str, tuple[dict[str, Any], str]] = {
    "text": (document(TEXT), "It rains."),
    "title": (document(TEXT, title="Weather", context="Today.", citations={"enabled": True}), "Weather\nToday.\nIt rains."),
    "title null": (document(TEXT, title=None, context=""), "It rains."),
    "content": (document({"type": "content", "content": "It rains."}), "It rains."),
    "blocks": (
        document({"type": "content", "content": [{"type": "text", "text": "It"}, {"type": "text", "text": "rains."}]}),
        "It\nrains.",
    ),
}


@pytest.mark.parametrize(("block", "text"), TEXTS.values(), ids=TEXTS)
def test_a_document_with_text_becomes_a_text_block(block: dict[str, Any], text: str) -> None:
    question = {"type": "text", "text": "Does it?"}
    assert parsed_content(block, question) == [{"type": "text", "text": text}, question]
    result = {"type": "tool_result", "tool_use_id": "1", "content": [question, block]}
    assert parsed_content(result) == [{**result, "content": [question, {"type": "text", "text": text}]}]


OTHERS: dict[str, Any] = {
    "PDF": document({"type": "base64", "media_type": "application/pdf", "data": "AAAA"}),
    "URL": document({"type": "url", "url": "https://example.org/a.pdf"}),
    "file": document({"type": "file", "file_id": "a"}),
    "no source": {"type": "document"},
    "source is a list": document([]),
    "type is a list": document({"type": [], "data": "a"}),
    "text without data": document({"type": "text"}),
    "text is a number": document({"type": "text", "data": 5}),
    "picture in content": document({"type": "content", "content": [{"type": "image", "source": {}}]}),
    "content is a number": document({"type": "content", "content": 5}),
}


@pytest.mark.parametrize("in_result", [False, True])
@pytest.mark.parametrize("block", OTHERS.values(), ids=OTHERS)
def test_another_document_is_rejected_with_its_place(block: Any, in_result: bool) -> None:
    with pytest.raises(errors.InvalidRequest, match="media_type") as error_info:
        parsed_content({"type": "tool_result", "content": [block]} if in_result else block)
    assert error_info.value.param == f"messages[0].content[0]{'.content[0]' * in_result}.source"


def test_a_title_that_is_no_text_is_rejected() -> None:
    with pytest.raises(errors.InvalidRequest, match="title"):
        parsed_content(document(TEXT, title=5))


@pytest.mark.parametrize("block", [{"type": "search_result"}, {"type": ["text"]}, {}, "text", None])
def test_a_block_that_vllm_would_leave_out_of_a_tool_result_is_rejected(block: Any) -> None:
    with pytest.raises(errors.InvalidRequest) as error_info:
        parsed_content({"type": "tool_result", "content": [{"type": "text", "text": "a"}, block]})
    assert error_info.value.param == "messages[0].content[0].content[1]"

"""Anthropic's `document` blocks: those with text become text blocks, since vLLM takes no documents."""

from collections.abc import Callable
from typing import Any

from common import errors
from server.apis.request import Path, convert_list, format_path, type_of
from server.http import json_body

_TOOL_RESULT_TYPES = {"text", "image", "tool_reference"}
"""Types of blocks in a tool's result. vLLM would leave out others silently."""


def convert_documents(body: dict[str, Any]) -> dict[str, Any]:
    """Return a body whose documents are text blocks. Raises `InvalidRequest` for a document without text (PDF)."""
    return convert_list(body, "messages", lambda message, i: _convert_message(message, ("messages", i)))


def _convert_message(message: Any, path: Path) -> Any:
    return _convert_content(message, path, _convert_block) if isinstance(message, dict) else message


def _convert_content(holder: dict[str, Any], path: Path, convert: Callable[[Any, Path], Any]) -> dict[str, Any]:
    return convert_list(holder, "content", lambda block, i: convert(block, (*path, "content", i)))


def _convert_block(block: Any, path: Path) -> Any:
    block_type = type_of(block)
    if block_type == "document":
        return _text_block(block, format_path(path))
    if block_type == "tool_result":
        return _convert_content(block, path, _convert_result_block)
    return block


def _convert_result_block(block: Any, path: Path) -> Any:
    block_type, location = type_of(block), format_path(path)
    if block_type == "document":
        return _text_block(block, location)
    if not isinstance(block_type, str) or block_type not in _TOOL_RESULT_TYPES:
        raise errors.InvalidRequest(
            f"{location}: type {json_body.quote(block_type)} is not supported in a tool result; "
            "expected text, image or document.",
            param=location,
        )
    return block


def _text_block(document: dict[str, Any], location: str) -> dict[str, Any]:
    """Return the text block that stands for a document: its title and context, where it has them, and its text."""
    head = [document.get(name) for name in ("title", "context")]
    if not all(isinstance(text, str | None) for text in head):
        raise errors.InvalidRequest(f"{location}: title and context of a document must be strings.", param=location)
    return {"type": "text", "text": "\n".join([*filter(None, head), _document_text(document.get("source"), location)])}


def _document_text(source: Any, location: str) -> str:
    source_type = type_of(source)
    if source_type == "text" and isinstance(source.get("data"), str):
        return str(source["data"])
    if source_type == "content" and isinstance(source.get("content"), str):
        return str(source["content"])
    if source_type == "content" and isinstance(source.get("content"), list) and all(map(_is_text, source["content"])):
        return "\n".join(block["text"] for block in source["content"])
    raise errors.InvalidRequest(
        f"{location}: a document with a source of type {json_body.quote(source_type)} is not supported; expected "
        '{"type": "text", "media_type": "text/plain", "data": "…"}: send a PDF as its text, or its pages as images.',
        param=f"{location}.source",
    )


def _is_text(block: Any) -> bool:
    return type_of(block) == "text" and isinstance(block.get("text"), str)

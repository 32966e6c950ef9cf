"""Anthropic's `document` blocks: those with text become text blocks, since vLLM takes no documents."""

from typing import Any

from common import errors
from server.apis.image_options import format_value
from server.apis.request import Path, format_path

_TOOL_RESULT_TYPES = {"text", "image", "tool_reference"}
"""Types of blocks in a tool's result. vLLM would leave out others silently."""


def convert_documents(body: dict[str, Any]) -> dict[str, Any]:
    """Return a body whose documents are text blocks. Raises `InvalidRequest` for a document without text (PDF)."""
    messages = body.get("messages")
    if not isinstance(messages, list):
        return body
    converted = [_convert_message(message, ("messages", i)) for i, message in enumerate(messages)]
    is_changed = any(new is not old for new, old in zip(converted, messages, strict=True))
    return {**body, "messages": converted} if is_changed else body


def _convert_message(message: Any, path: Path) -> Any:
    return _convert_content(message, path, _convert_block) if isinstance(message, dict) else message


def _convert_content(holder: dict[str, Any], path: Path, convert: Any) -> dict[str, Any]:
    """Return an object with its `content` converted block by block; the same object if nothing changes."""
    blocks = holder.get("content")
    if not isinstance(blocks, list):
        return holder
    converted = [convert(block, (*path, "content", i)) for i, block in enumerate(blocks)]
    is_changed = any(new is not old for new, old in zip(converted, blocks, strict=True))
    return {**holder, "content": converted} if is_changed else holder


def _convert_block(block: Any, path: Path) -> Any:
    block_type = block.get("type") if isinstance(block, dict) else None
    if block_type == "document":
        return _text_block(block, format_path(path))
    if block_type == "tool_result":
        return _convert_content(block, path, _convert_result_block)
    return block


def _convert_result_block(block: Any, path: Path) -> Any:
    block_type, location = block.get("type") if isinstance(block, dict) else None, format_path(path)
    if block_type == "document":
        return _text_block(block, location)
    if not isinstance(block_type, str) or block_type not in _TOOL_RESULT_TYPES:
        raise errors.InvalidRequest(
            f"{location}: type {format_value(block_type)} is not supported in a tool result; expected text, image or document.",
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
    source_type = source.get("type") if isinstance(source, dict) else None
    if source_type == "text" and isinstance(source.get("data"), str):
        return str(source["data"])
    if source_type == "content" and isinstance(source.get("content"), str):
        return str(source["content"])
    if source_type == "content" and isinstance(source.get("content"), list) and all(map(_is_text, source["content"])):
        return "\n".join(block["text"] for block in source["content"])
    raise errors.InvalidRequest(
        f"{location}: a document with a source of type {format_value(source_type)} is not supported; expected "
        '{"type": "text", "media_type": "text/plain", "data": "…"}: send a PDF as its text, or its pages as images.',
        param=f"{location}.source",
    )


def _is_text(block: Any) -> bool:
    return isinstance(block, dict) and block.get("type") == "text" and isinstance(block.get("text"), str)

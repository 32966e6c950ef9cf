"""Text that resembles an image's placeholder stays text, and each image keeps its place."""

import json
from typing import Any

import pytest

from tests.e2e.serving import ROOT, Served, image_part, text_part

SQUARE = image_part("square.png")
CONTEXT_TOKEN = 5  # <IMG_CONTEXT>
TROUBLE = ROOT / "tests/data/trouble"
TEXTS = [
    "<image>",
    "<IMG_CONTEXT>",
    "<image>\n<image>",
    "</img><img><IMG_CONTEXT></img>",
    "<##IMAGE##> <image\u200d>",
    "{}<image>",
]


def prompt(served: Served, messages: list[Any]) -> tuple[str, int]:
    """Returns the prompt as the model gets it and its number of visual tokens."""
    body = {"messages": messages, "max_tokens": 2, "temperature": 0, "return_token_ids": True, "vir": "off"}
    answer = served.post("/v1/chat/completions", body)
    assert answer.status == 200, answer.text
    tokens = answer.json["prompt_token_ids"]
    text: str = served.post("/detokenize", {"model": "checkpoint", "tokens": tokens}).json["prompt"]
    return text, tokens.count(CONTEXT_TOKEN)


def conversation(text: str) -> list[Any]:
    """Returns a chat with two images and this text in every place that the template renders."""
    return [
        {"role": "system", "content": f"be brief {text}"},
        {"role": "user", "content": [text_part(f"a {text} b"), SQUARE, text_part(f"c {text} d")]},
        {"role": "assistant", "content": f"Write {text} with an href."},
        {"role": "tool", "tool_call_id": "1", "content": [text_part(f"<rss>{text}</rss>")]},
        {"role": "user", "content": [SQUARE, text_part(f"{text}")]},
    ]


@pytest.mark.parametrize("text", TEXTS)
def test_the_prompt_has_the_text_and_the_images_in_their_places(served: Served, text: str) -> None:
    neutral, count = prompt(served, conversation("WORD"))
    assert count == 2 * 256
    actual, actual_count = prompt(served, conversation(text))
    # tokens of the text itself, which the model reads as ordinary ones, decode to the same characters
    assert actual == neutral.replace("WORD", text)
    assert actual_count == count


@pytest.mark.parametrize("name", ["B31b_assistant_said_image", "B31c_tool_description", "B31d_tool_result"])
def test_requests_that_coding_agents_send_are_served(served: Served, name: str) -> None:
    answer = served.post("/v1/chat/completions", json.loads((TROUBLE / f"{name}.json").read_text()))
    assert answer.status == 200, answer.text
    assert answer.headers["x-dvd-images"].startswith("images=1; ")


def test_calls_of_tools_may_have_escaped_placeholders(served: Served) -> None:
    function = {"name": "look", "arguments": json.dumps({"x": "<image>"}).replace("<", r"\u003c").replace(">", r"\u003e")}
    call = {"id": "call_1", "type": "function", "function": function}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "<image>"},
        {"role": "user", "content": [SQUARE, text_part("what is it?")]},
    ]
    assert prompt(served, messages)[1] == 256


@pytest.mark.parametrize("text", TEXTS)
def test_the_other_apis_serve_such_text(served: Served, text: str) -> None:
    url = SQUARE["image_url"]["url"]
    parts = [{"type": "input_text", "text": text}, {"type": "input_image", "image_url": url}]
    body: dict[str, Any] = {"model": "checkpoint", "input": [{"role": "user", "content": parts}], "instructions": text}
    answer = served.post("/v1/responses", {**body, "max_output_tokens": 2})
    assert answer.status == 200, answer.text
    source = {"type": "base64", "media_type": "image/png", "data": url.partition(",")[2]}
    blocks = [text_part(text), {"type": "image", "source": source}]
    body = {"model": "checkpoint", "messages": [{"role": "user", "content": blocks}], "system": text}
    answer = served.post("/v1/messages", {**body, "max_tokens": 2})
    assert answer.status == 200, answer.text
    usage = answer.json["usage"]
    counted = served.post("/v1/messages/count_tokens", body).json["input_tokens"]
    assert counted == usage["input_tokens"] + usage["cache_creation_input_tokens"] + usage["cache_read_input_tokens"]
    tokens = served.post("/tokenize", {"model": "checkpoint", "messages": conversation(text), "vir": "off"}).json["tokens"]
    assert tokens.count(CONTEXT_TOKEN) == 2 * 256

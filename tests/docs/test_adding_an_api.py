"""The example of docs/adding-an-api.md runs as it is printed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from common import errors
from server.apis.base import Api
from server.apis.image_options import RequestPolicy

PAGE = (Path(__file__).parents[2] / "docs/adding-an-api.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]


@pytest.fixture(scope="module")
def api() -> Api:
    module: dict[str, Any] = {}
    exec(compile(CODE, "server/apis/batch.py", "exec"), module)
    (api,) = module["APIS"]
    assert isinstance(api, Api)
    return api


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def conversation(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]


def encode(*conversations: list[dict[str, Any]]) -> bytes:
    return json.dumps({"messages": list(conversations)}).encode()


def test_images_of_every_conversation_are_replaced(api: Api) -> None:
    raw = encode(conversation(image("data:a")), conversation(), conversation(image("data:b"), image("data:c")))
    parsed = api.parse(raw, RequestPolicy(max_images=3))
    assert [part.url for part in parsed.images] == ["data:a", "data:b", "data:c"]
    body = json.loads(parsed.with_embeddings(["a", "b", "c"], [256, 512, 768]))
    uuids = [[part.get("uuid") for part in messages[0]["content"]] for messages in body["messages"]]
    assert uuids == [["a", None], [None], ["b", "c", None]]


def test_images_of_all_conversations_count(api: Api) -> None:
    raw = encode(conversation(image("data:a")), conversation(image("data:b")))
    with pytest.raises(errors.TooManyImages):
        api.parse(raw, RequestPolicy(max_images=1))


def test_the_example_has_no_images(api: Api) -> None:
    raw = json.dumps(api.example).encode()
    assert api.parse(raw, RequestPolicy(max_images=1)).with_embeddings([], []) == raw

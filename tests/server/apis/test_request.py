"""What all bodies have in common: what only the operator may set, and texts passed as they came."""

import json
from typing import Any

import pytest

from common import errors
from server.apis import completions
from server.apis.image_options import RequestPolicy
from server.apis.request import check_fields, format_path

parse_text = completions.APIS[0].parse


def deep(depth: int) -> Any:
    made: Any = "x"
    for _ in range(depth):
        made = [made]
    return made


NOT_FROM_CALLERS = [
    "mm_processor_kwargs", "media_io_kwargs", "chat_template", "kv_transfer_params", "ec_transfer_params", "vllm_xargs",
    "prompt_embeds",
]  # fmt: skip


@pytest.mark.parametrize("name", NOT_FROM_CALLERS)
def test_what_only_the_operator_may_set_is_refused(name: str) -> None:
    for value in ({}, "x", {"code_revision": "main"}, False):
        with pytest.raises(errors.InvalidRequest) as caught:
            check_fields({"model": "m", name: value})
        assert caught.value.param == name
    check_fields({"model": "m", name: None})


def test_models_that_are_no_names_are_refused() -> None:
    for model in (5, True, [], {}, deep(900)):
        with pytest.raises(errors.InvalidRequest) as caught:
            parse_text(json.dumps({"model": model}).encode(), RequestPolicy(1))
        assert caught.value.param == "model"


def test_a_text_is_passed_byte_for_byte() -> None:
    body = b'{ "prompt" : "a\\u00e9 \xc3\xa9", "model" :"m","x":1.50}\n'
    assert parse_text(body, RequestPolicy(1)).with_embeddings([], []) is body


def test_places_are_named_as_callers_write_them() -> None:
    assert format_path(("messages", 0, "content", 12)) == "messages[0].content[12]"

"""Checks that all APIs share, and the replacement of parts in a body."""

import json
from typing import Any

import pytest

from common import errors
from server.apis import completions
from server.apis.image_options import RequestPolicy
from server.apis.request import check_fields, format_path
from tests.server.apis.helpers import nested_list

parse_text = completions.APIS[0].parse


OPERATOR_FIELDS = [
    "mm_processor_kwargs", "media_io_kwargs", "chat_template", "kv_transfer_params", "ec_transfer_params", "vllm_xargs",
    "prompt_embeds",
]  # fmt: skip


@pytest.mark.parametrize("name", OPERATOR_FIELDS)
def test_fields_reserved_for_the_operator_are_rejected(name: str) -> None:
    for value in ({}, "x", {"code_revision": "main"}, False):
        with pytest.raises(errors.InvalidRequest) as error_info:
            check_fields({"model": "m", name: value})
        assert error_info.value.param == name
    check_fields({"model": "m", name: None})


def test_a_model_that_is_not_a_string_is_rejected() -> None:
    models: list[Any] = [5, True, [], {}, nested_list(900)]
    for model in models:
        with pytest.raises(errors.InvalidRequest) as error_info:
            parse_text(json.dumps({"model": model}).encode(), RequestPolicy(1))
        assert error_info.value.param == "model"


def test_a_text_request_passes_byte_for_byte() -> None:
    body = b'{ "prompt" : "a\\u00e9 \xc3\xa9", "model" :"m","x":1.50}\n'
    assert parse_text(body, RequestPolicy(1)).with_embeddings([], []) is body


def test_a_path_is_formatted_as_callers_write_it() -> None:
    assert format_path(("messages", 0, "content", 12)) == "messages[0].content[12]"

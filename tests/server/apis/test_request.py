"""Checks that all APIs share, and the replacement of parts in a body."""

import ast
import json
from importlib.resources import files
from typing import Any

import pytest

from common import errors
from server.apis import completions
from server.apis.image_options import RequestPolicy
from server.apis.request import _TEMPLATE_PARAMETERS, check_fields, format_path
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


NO_OBJECTS: dict[str, Any] = {"string": "x", "number": 5, "false": False, "list": ["x"]}


@pytest.mark.parametrize("value", NO_OBJECTS.values(), ids=NO_OBJECTS)
@pytest.mark.parametrize("name", ["chat_template_kwargs", "structured_outputs"])
def test_what_must_be_an_object_is_named_with_its_value(name: str, value: Any) -> None:
    with pytest.raises(errors.InvalidRequest) as error_info:
        check_fields({"model": "m", name: value})
    shown = "a list" if isinstance(value, list) else json.dumps(value)
    assert str(error_info.value) == f"{name} is {shown}: expected an object."
    assert error_info.value.param == name


def test_a_text_to_stop_at_is_named() -> None:
    with pytest.raises(errors.InvalidRequest, match=r"^stop\[1\] is null: expected a string\.$") as error_info:
        check_fields({"model": "m", "stop": ["a", None]})
    assert error_info.value.param == "stop[1]"


def test_tools_must_be_a_list() -> None:
    with pytest.raises(errors.InvalidRequest, match=r"^tools is 5: expected a list\.$") as error_info:
        check_fields({"model": "m", "tools": 5})
    assert error_info.value.param == "tools"


@pytest.mark.parametrize(("name", "hint"), [("messages", "send messages as a field"), ("padding", "omit it")])
def test_parameters_of_transformers_are_no_variables_of_the_template(name: str, hint: str) -> None:
    with pytest.raises(errors.InvalidRequest, match=f"is not a variable of the chat template: {hint}") as error_info:
        check_fields({"model": "m", "chat_template_kwargs": {"enable_thinking": False, name: None}})
    assert error_info.value.param == f"chat_template_kwargs.{name}"
    check_fields({"model": "m", "chat_template_kwargs": {"enable_thinking": False, "documents": []}})


def test_the_reserved_variables_are_all_parameters_of_transformers() -> None:
    """vLLM passes the rest: what it sets itself for each request, and documents."""
    source = files("transformers").joinpath("tokenization_utils_base.py").read_text(encoding="utf-8")
    function = next(
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and node.name == "apply_chat_template"
    )
    parameters = {argument.arg for argument in function.args.args} - {"self"}
    free = {"documents", "add_generation_prompt", "continue_final_message"}
    assert parameters - free | {"messages", "self"} == set(_TEMPLATE_PARAMETERS)


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

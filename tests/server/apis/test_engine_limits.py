"""Values that vLLM would fail on."""

import json
from typing import Any

import pytest

from common import errors
from server.apis import chat as chat_api
from server.apis import completions
from server.apis.engine_limits import check_integers
from server.apis.image_options import RequestPolicy
from tests.server.fakes.requests import chat


@pytest.mark.parametrize("value", [0, 2**64 - 1, -(2**63), 1e300, "9" * 5000, True, None, [], {}])
def test_values_of_64_bits_pass(value: Any) -> None:
    check_integers({"a": {"b": [value]}})


@pytest.mark.parametrize(("value", "bits"), [(2**64, 65), (-(2**63) - 1, 64), (2**70, 71), (10**4000, 13288)])
@pytest.mark.parametrize(
    ("fields", "place"),
    [
        (lambda n: {"top_k": n}, "top_k"),
        (lambda n: {"a": [1, n, 2]}, "a[1]"),
        (lambda n: {"tools": [{"a": [0, {"b": n}]}]}, "tools[0].a[1].b"),
    ],
)
def test_a_larger_integer_is_rejected_with_its_place(value: int, bits: int, fields: Any, place: str) -> None:
    raw = json.dumps(chat("a", **fields(value))).encode()
    for api in (chat_api.APIS[0], completions.APIS[0]):
        with pytest.raises(errors.InvalidRequest, match=f"{bits} bits") as error_info:
            api.parse(raw, RequestPolicy(1))
        assert error_info.value.param == place


def test_the_place_is_cut() -> None:
    with pytest.raises(errors.InvalidRequest) as error_info:
        check_integers({"x" * 10_000: 2**70})
    assert len(str(error_info.value)) < 400

"""The dial: what a caller says of an image, within what the operator allows."""

from typing import Any

import pytest

from common import errors
from protos import vision_pb2 as pb
from server.apis.image_options import RequestPolicy, parse_image_options, parse_router
from tests.server.fakes.vision_worker import checkpoint_description

ANY = RequestPolicy(1)
WHERE = "messages[0].content[1].image_url"


def deep(depth: int) -> Any:
    made: Any = "x"
    for _ in range(depth):
        made = [made]
    return made


def bounds(allowed: int | None = None, own: dict[str, Any] | None = None, **said: Any) -> tuple[int, int]:
    """Fewest and most tiles of an image that says this."""
    tiling = parse_image_options(said, WHERE, pb.Router(), ANY).tiling(checkpoint_description(**(own or {})), allowed)
    return tiling.min_tiles, tiling.max_tiles


@pytest.mark.parametrize("detail", [None, "auto", "high"])
def test_the_checkpoints_own_tiling_is_the_default(detail: str | None) -> None:
    assert bounds(detail=detail) == (1, 12)
    assert bounds(40, detail=detail) == (1, 12), "what the operator allows beyond it has to be asked for"
    assert bounds(6, detail=detail) == (1, 6), "an operator's bound holds for all"
    assert bounds(own={"min_tiles": 2, "max_tiles": 6}, detail=detail) == (2, 6)


def test_low_is_one_tile() -> None:
    assert bounds(detail="low") == (1, 1)
    assert bounds(own={"min_tiles": 3}, detail="low", max_dynamic_patch=1) == (1, 1)


def test_original_is_as_many_tiles_as_the_operator_allows() -> None:
    assert bounds(detail="original") == (1, 12)
    assert bounds(40, detail="original") == (1, 40)
    assert bounds(3, detail="original") == (1, 3)


@pytest.mark.parametrize("detail", [None, "auto", "high", "original"])
def test_a_number_says_it_exactly(detail: str | None) -> None:
    assert bounds(detail=detail, max_dynamic_patch=7) == (1, 7)
    assert bounds(40, detail=detail, max_dynamic_patch=24) == (1, 24)
    assert bounds(own={"min_tiles": 4}, detail=detail, max_dynamic_patch=2) == (2, 2)


@pytest.mark.parametrize(("allowed", "asked", "most"), [(None, 13, 12), (24, 25, 24), (6, 12, 6)])
def test_more_than_is_allowed_is_refused_with_the_bound(allowed: int | None, asked: int, most: int) -> None:
    with pytest.raises(errors.InvalidRequest, match=f"max_dynamic_patch {asked} exceeds {most}") as caught:
        bounds(allowed, max_dynamic_patch=asked)
    assert caught.value.param == f"{WHERE}.max_dynamic_patch"


NO_WORDS: dict[str, tuple[dict[str, Any], str, str]] = {
    "detail unknown": ({"detail": "ultra"}, "detail", "'ultra' is not one of low, high, original, auto"),
    "detail in capitals": ({"detail": "HIGH"}, "detail", "'HIGH' is not"),
    "detail empty": ({"detail": ""}, "detail", "'' is not"),
    "detail number": ({"detail": 1}, "detail", "1 is not"),
    "detail deep": ({"detail": deep(900)}, "detail", "list is not"),
    "detail long": ({"detail": "x" * 100_000}, "detail", "'xxx"),
    "number zero": ({"max_dynamic_patch": 0}, "max_dynamic_patch", "0 is not an integer from 1 to 40"),
    "number negative": ({"max_dynamic_patch": -1}, "max_dynamic_patch", "-1 is not"),
    "number above": ({"max_dynamic_patch": 41}, "max_dynamic_patch", "41 is not"),
    "number broken": ({"max_dynamic_patch": 6.0}, "max_dynamic_patch", "6.0 is not"),
    "number true": ({"max_dynamic_patch": True}, "max_dynamic_patch", "True is not"),
    "number text": ({"max_dynamic_patch": "6"}, "max_dynamic_patch", "'6' is not"),
    "number huge": ({"max_dynamic_patch": 10**4000}, "max_dynamic_patch", "1000"),
    "low and a number": (
        {"detail": "low", "max_dynamic_patch": 6},
        "max_dynamic_patch",
        "6 contradicts detail low",
    ),
}


@pytest.mark.parametrize(("said", "param", "message"), NO_WORDS.values(), ids=NO_WORDS)
def test_words_that_are_none_are_refused_with_their_place(said: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(errors.InvalidRequest, match=message) as caught:
        parse_image_options(said, WHERE, pb.Router(), ANY)
    assert caught.value.param == f"{WHERE}.{param}"
    assert len(str(caught.value)) < 400


def test_an_operator_may_keep_the_router_to_himself() -> None:
    closed = RequestPolicy(1, HALF, allow_vir=False)
    assert parse_image_options({"vir": None}, WHERE, HALF, closed).router == HALF
    with pytest.raises(errors.InvalidRequest, match="vir is disabled on this server") as caught:
        parse_router({}, HALF, closed)
    assert caught.value.param == "vir"
    with pytest.raises(errors.InvalidRequest) as caught:
        parse_image_options({"vir": {"mode": "off"}}, WHERE, HALF, closed)
    assert caught.value.param == f"{WHERE}.vir"


OFF, ALL, HALF = pb.Router(mode=pb.Router.OFF), pb.Router(mode=pb.Router.ALL), pb.Router(relative_threshold=0.5)
BOTH = pb.Router(relative_threshold=0.5, absolute_threshold=0.25)
# what the caller says, what the operator does, what is in force
ROUTERS: dict[str, tuple[Any, pb.Router, pb.Router]] = {
    "nothing": (None, pb.Router(), pb.Router()),
    "nothing, and the operator off": (None, OFF, OFF),
    "empty, and the operator's thresholds": ({}, BOTH, BOTH),
    "nulls": ({"mode": None, "relative_threshold": None}, HALF, HALF),
    "off": ({"mode": "off"}, pb.Router(), OFF),
    "off, and the operator's thresholds have no part in it": ({"mode": "off"}, BOTH, OFF),
    "all": ({"mode": "all"}, OFF, ALL),
    "auto": ({"mode": "auto"}, ALL, pb.Router()),
    "auto, and the operator's thresholds": ({"mode": "auto"}, BOTH, BOTH),
    "threshold": ({"relative_threshold": 0.5}, pb.Router(), HALF),
    "threshold, and the operator's other one": ({"absolute_threshold": 0.25}, HALF, BOTH),
    "threshold instead of the operator's": ({"relative_threshold": 0.5}, pb.Router(relative_threshold=0.75), HALF),
    "auto with thresholds": ({"mode": "auto", "relative_threshold": 0.5, "absolute_threshold": 0.25}, OFF, BOTH),
    "whole numbers": (
        {"relative_threshold": 0, "absolute_threshold": 1}, BOTH, pb.Router(relative_threshold=0, absolute_threshold=1)
    ),
}  # fmt: skip


@pytest.mark.parametrize(("said", "own", "router"), ROUTERS.values(), ids=ROUTERS)
def test_the_router_is_the_callers_before_the_operators(said: Any, own: pb.Router, router: pb.Router) -> None:
    assert parse_router(said, own, ANY) == router


NO_ROUTERS: dict[str, tuple[Any, str, str]] = {
    "a mode alone": ("off", "vir", "an object such as .*, not 'off'"),
    "false": (False, "vir", "not False"),
    "a list": ([{"mode": "off"}], "vir", "not list"),
    "deep": (deep(900), "vir", "not list"),
    "unknown field": ({"mode": "auto", "treshold": 0.5}, "vir", "unknown field 'treshold'; expected mode, relative_threshold"),
    "unknown field null": ({"treshold": None}, "vir", "unknown field 'treshold'"),
    "long field": ({"x" * 100_000: 1}, "vir", "unknown field 'xxx"),
    "mode unknown": ({"mode": "on"}, "vir.mode", "'on' is not one of auto, off, all"),
    "mode in capitals": ({"mode": "OFF"}, "vir.mode", "'OFF' is not one of"),
    "mode number": ({"mode": 1}, "vir.mode", "1 is not one of"),
    "mode deep": ({"mode": deep(900)}, "vir.mode", "list is not one of"),
    "mode long": ({"mode": "x" * 100_000}, "vir.mode", "'xxx"),
    "threshold text": ({"relative_threshold": "0.5"}, "vir.relative_threshold", "'0.5' is not a number from 0 to 1"),
    "threshold true": ({"absolute_threshold": True}, "vir.absolute_threshold", "True is not a number"),
    "threshold object": ({"absolute_threshold": {}}, "vir.absolute_threshold", "dict is not a number"),
    "threshold below": ({"relative_threshold": -0.01}, "vir.relative_threshold", "-0.01 is not"),
    "threshold above": ({"absolute_threshold": 1.01}, "vir.absolute_threshold", "1.01 is not"),
    "threshold of 4000 digits": ({"absolute_threshold": 10**4000}, "vir.absolute_threshold", "1000"),
    "off with a threshold": (
        {"mode": "off", "relative_threshold": 0.5},
        "vir.relative_threshold",
        "0.5 requires mode auto",
    ),
    "all with a threshold": (
        {"mode": "all", "absolute_threshold": 0},
        "vir.absolute_threshold",
        "requires mode auto",
    ),
}


@pytest.mark.parametrize(("said", "param", "message"), NO_ROUTERS.values(), ids=NO_ROUTERS)
def test_settings_of_the_router_that_are_none_are_refused(said: Any, param: str, message: str) -> None:
    with pytest.raises(errors.InvalidRequest, match=message) as caught:
        parse_router(said, pb.Router(), ANY)
    assert caught.value.param == param
    assert len(str(caught.value)) < 400
    with pytest.raises(errors.InvalidRequest) as caught:
        parse_image_options({"vir": said}, "images[3]", pb.Router(), ANY)
    assert caught.value.param == f"images[3].{param}"
    assert param in str(caught.value)


def test_a_threshold_where_the_operator_asks_no_router_needs_a_mode() -> None:
    with pytest.raises(errors.InvalidRequest, match='the mode is off: .* "mode": "auto"'):
        parse_router({"relative_threshold": 0.5}, OFF, ANY)

"""Options of an image: what callers may set, and what the operator allows."""

from typing import Any

import pytest

from common import errors
from protos import vision_pb2 as pb
from server.apis.image_options import RequestPolicy, parse_image_options, parse_router
from tests.server.apis.helpers import nested_list
from tests.server.fakes.vision_worker import checkpoint_description

POLICY = RequestPolicy(1)
LOCATION = "messages[0].content[1].image_url"


def tile_bounds(allowed: int | None = None, checkpoint: dict[str, Any] | None = None, **options: Any) -> tuple[int, int]:
    """Return the minimum and maximum number of tiles of an image with these options.

    Args:
        allowed: The operator's bound.
        checkpoint: Fields of the checkpoint's description that differ from the default.
        **options: Options of the image.
    """
    parsed = parse_image_options(options, LOCATION, pb.Router(), POLICY)
    tiling = parsed.tiling(checkpoint_description(**(checkpoint or {})), allowed)
    return tiling.min_tiles, tiling.max_tiles


@pytest.mark.parametrize("detail", [None, "auto", "high"])
def test_the_checkpoints_tiling_is_the_default(detail: str | None) -> None:
    assert tile_bounds(detail=detail) == (1, 12)
    assert tile_bounds(40, detail=detail) == (1, 12), "a higher bound of the operator is for requests that ask for more"
    assert tile_bounds(6, detail=detail) == (1, 6), "a lower bound of the operator applies to every request"
    assert tile_bounds(checkpoint={"min_tiles": 2, "max_tiles": 6}, detail=detail) == (2, 6)


def test_detail_low_is_one_tile() -> None:
    assert tile_bounds(detail="low") == (1, 1)
    assert tile_bounds(checkpoint={"min_tiles": 3}, detail="low", max_dynamic_patch=1) == (1, 1)


def test_detail_original_is_the_operators_maximum() -> None:
    assert tile_bounds(detail="original") == (1, 12)
    assert tile_bounds(40, detail="original") == (1, 40)
    assert tile_bounds(3, detail="original") == (1, 3)


@pytest.mark.parametrize("detail", [None, "auto", "high", "original"])
def test_max_dynamic_patch_sets_the_maximum(detail: str | None) -> None:
    assert tile_bounds(detail=detail, max_dynamic_patch=7) == (1, 7)
    assert tile_bounds(40, detail=detail, max_dynamic_patch=24) == (1, 24)
    assert tile_bounds(checkpoint={"min_tiles": 4}, detail=detail, max_dynamic_patch=2) == (2, 2)


@pytest.mark.parametrize(("allowed", "requested", "maximum"), [(None, 13, 12), (24, 25, 24), (6, 12, 6)])
def test_more_tiles_than_allowed_are_rejected_with_the_maximum(allowed: int | None, requested: int, maximum: int) -> None:
    with pytest.raises(
        errors.InvalidRequest,
        match=f"expected an integer from 1 to {maximum}, not {requested}; {maximum} is this server's maximum",
    ) as error_info:
        tile_bounds(allowed, max_dynamic_patch=requested)
    assert error_info.value.param == f"{LOCATION}.max_dynamic_patch"


INVALID_OPTIONS: dict[str, tuple[dict[str, Any], str, str]] = {
    "detail unknown": ({"detail": "ultra"}, "detail", 'expected one of low, high, original, auto, not "ultra"'),
    "detail in capitals": ({"detail": "HIGH"}, "detail", 'not "HIGH"'),
    "detail empty": ({"detail": ""}, "detail", 'not ""'),
    "detail number": ({"detail": 1}, "detail", "not 1"),
    "detail nested deeply": ({"detail": nested_list(900)}, "detail", "not a list"),
    "detail too long": ({"detail": "x" * 100_000}, "detail", '"xxx'),
    "max_dynamic_patch 0": ({"max_dynamic_patch": 0}, "max_dynamic_patch", "expected an integer from 1 to 40, not 0"),
    "max_dynamic_patch negative": ({"max_dynamic_patch": -1}, "max_dynamic_patch", "not -1"),
    "max_dynamic_patch above the maximum": ({"max_dynamic_patch": 41}, "max_dynamic_patch", "not 41"),
    "max_dynamic_patch float": ({"max_dynamic_patch": 6.0}, "max_dynamic_patch", "not 6.0"),
    "max_dynamic_patch true": ({"max_dynamic_patch": True}, "max_dynamic_patch", "not true"),
    "max_dynamic_patch string": ({"max_dynamic_patch": "6"}, "max_dynamic_patch", 'not "6"'),
    "max_dynamic_patch of 4000 digits": ({"max_dynamic_patch": 10**4000}, "max_dynamic_patch", "1000"),
    "detail low with max_dynamic_patch": (
        {"detail": "low", "max_dynamic_patch": 6},
        "max_dynamic_patch",
        "6 contradicts detail low",
    ),
}


@pytest.mark.parametrize(("options", "param", "message"), INVALID_OPTIONS.values(), ids=INVALID_OPTIONS)
def test_invalid_options_are_rejected_with_their_location(options: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(errors.InvalidRequest, match=message) as error_info:
        parse_image_options(options, LOCATION, pb.Router(), POLICY)
    assert error_info.value.param == f"{LOCATION}.{param}"
    assert len(str(error_info.value)) < 400


def test_the_operator_can_disable_vir() -> None:
    policy = RequestPolicy(1, HALF, allow_vir=False)
    assert parse_image_options({"vir": None}, LOCATION, HALF, policy).router == HALF
    with pytest.raises(errors.InvalidRequest, match="vir is disabled on this server") as error_info:
        parse_router({}, HALF, policy)
    assert error_info.value.param == "vir"
    with pytest.raises(errors.InvalidRequest) as error_info:
        parse_image_options({"vir": {"mode": "off"}}, LOCATION, HALF, policy)
    assert error_info.value.param == f"{LOCATION}.vir"


OFF, ALL, HALF = pb.Router(mode=pb.Router.OFF), pb.Router(mode=pb.Router.ALL), pb.Router(relative_threshold=0.5)
BOTH = pb.Router(relative_threshold=0.5, absolute_threshold=0.25)
# the caller's vir, the operator's router, the result
ROUTERS: dict[str, tuple[Any, pb.Router, pb.Router]] = {
    "unset": (None, pb.Router(), pb.Router()),
    "unset, operator off": (None, OFF, OFF),
    "empty, operator with thresholds": ({}, BOTH, BOTH),
    "nulls": ({"mode": None, "relative_threshold": None}, HALF, HALF),
    "off": ({"mode": "off"}, pb.Router(), OFF),
    "off alone": ("off", BOTH, OFF),
    "all alone": ("all", OFF, ALL),
    "auto alone": ("auto", OFF, pb.Router()),
    "off, operator with thresholds": ({"mode": "off"}, BOTH, OFF),
    "all": ({"mode": "all"}, OFF, ALL),
    "auto": ({"mode": "auto"}, ALL, pb.Router()),
    "auto, operator with thresholds": ({"mode": "auto"}, BOTH, BOTH),
    "threshold": ({"relative_threshold": 0.5}, pb.Router(), HALF),
    "one threshold, operator with the other": ({"absolute_threshold": 0.25}, HALF, BOTH),
    "threshold overrides the operator's": ({"relative_threshold": 0.5}, pb.Router(relative_threshold=0.75), HALF),
    "auto with thresholds": ({"mode": "auto", "relative_threshold": 0.5, "absolute_threshold": 0.25}, OFF, BOTH),
    "integer thresholds": (
        {"relative_threshold": 0, "absolute_threshold": 1}, BOTH, pb.Router(relative_threshold=0, absolute_threshold=1)
    ),
}  # fmt: skip


@pytest.mark.parametrize(("vir", "operator", "expected"), ROUTERS.values(), ids=ROUTERS)
def test_the_callers_vir_precedes_the_operators_router(vir: Any, operator: pb.Router, expected: pb.Router) -> None:
    assert parse_router(vir, operator, POLICY) == expected


INVALID_VIR: dict[str, tuple[Any, str, str]] = {
    "string": ("on", "vir", 'expected auto, off, all, or an object, not "on"'),
    "string in capitals": ("OFF", "vir", 'not "OFF"'),
    "string empty": ("", "vir", 'not ""'),
    "false": (False, "vir", "not false"),
    "list": ([{"mode": "off"}], "vir", "not a list"),
    "nested deeply": (nested_list(900), "vir", "not a list"),
    "unknown field": ({"mode": "auto", "treshold": 0.5}, "vir.treshold", "did you mean relative_threshold?"),
    "unknown field null": ({"treshold": None}, "vir.treshold", "not a known field"),
    "unknown field too long": ({"x" * 100_000: 1}, f"vir.{'x' * 100}", "expected mode, relative_threshold"),
    "mode unknown": ({"mode": "on"}, "vir.mode", 'expected one of auto, off, all, not "on"'),
    "mode in capitals": ({"mode": "OFF"}, "vir.mode", 'not "OFF"'),
    "mode number": ({"mode": 1}, "vir.mode", "not 1"),
    "mode nested deeply": ({"mode": nested_list(900)}, "vir.mode", "not a list"),
    "mode too long": ({"mode": "x" * 100_000}, "vir.mode", '"xxx'),
    "threshold string": ({"relative_threshold": "0.5"}, "vir.relative_threshold", 'expected a number from 0 to 1, not "0.5"'),
    "threshold true": ({"absolute_threshold": True}, "vir.absolute_threshold", "not true"),
    "threshold object": ({"absolute_threshold": {}}, "vir.absolute_threshold", "not an object"),
    "threshold below 0": ({"relative_threshold": -0.01}, "vir.relative_threshold", "not -0.01"),
    "threshold above 1": ({"absolute_threshold": 1.01}, "vir.absolute_threshold", "not 1.01"),
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


@pytest.mark.parametrize(("vir", "param", "message"), INVALID_VIR.values(), ids=INVALID_VIR)
def test_an_invalid_vir_is_rejected_with_its_location(vir: Any, param: str, message: str) -> None:
    with pytest.raises(errors.InvalidRequest, match=message) as error_info:
        parse_router(vir, pb.Router(), POLICY)
    assert error_info.value.param == param
    assert len(str(error_info.value)) < 400
    with pytest.raises(errors.InvalidRequest) as error_info:
        parse_image_options({"vir": vir}, "images[3]", pb.Router(), POLICY)
    assert error_info.value.param == f"images[3].{param}"
    assert param in str(error_info.value)


def test_a_threshold_needs_mode_auto_if_the_operators_mode_is_off() -> None:
    with pytest.raises(errors.InvalidRequest, match='the mode is off: .* "mode": "auto"'):
        parse_router({"relative_threshold": 0.5}, OFF, POLICY)

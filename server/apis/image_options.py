"""Options that a request may set for an image: its maximum number of tiles, and how the router treats them."""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from common import errors
from common.tiling import MAX_TILES, resolve_tile_bounds
from protos import embeddings_pb2
from protos import vision_pb2 as pb
from server.http import json_body

_MODES = ("auto", "off", "all")
_THRESHOLDS = ("relative_threshold", "absolute_threshold")
_DETAILS = ("low", "high", "original", "auto")

OPTION_KEYS = ("detail", "max_dynamic_patch", "vir")
"""Keys of the options that every image and video may have."""

_OTHER_NAMES = {
    "fps": "num_frames", "frames": "num_frames", "max_frames": "num_frames", "nframes": "num_frames",
    "max_num": "max_dynamic_patch", "max_patches": "max_dynamic_patch", "max_tiles": "max_dynamic_patch",
    "num_tiles": "max_dynamic_patch", "tiles": "max_dynamic_patch", "quality": "detail", "resolution": "detail",
    "mode": "vir", "router": "vir",
}  # fmt: skip
"""What other APIs call an option, where its name does not resemble ours."""


@dataclass(frozen=True)
class RequestPolicy:
    """What the operator allows in a request, and the router's defaults.

    Attributes:
        max_images: Maximum number of images, each frame of a video counted.
        router: Router settings of requests that do not set `vir`.
        allow_vir: Whether a request may set `vir`.
        max_sequences: Maximum number of sequences that a request generates.
        compiled_tools: Whether vLLM compiles the schemas of tools that the model need not call, too.
    """

    max_images: int
    router: pb.Router = field(default_factory=pb.Router)
    allow_vir: bool = True
    max_sequences: int = 128
    compiled_tools: bool = False


@dataclass(frozen=True)
class ImageOptions:
    """Options of one image.

    Attributes:
        location: Where the options are in the body, for error messages: `messages[0].content[1].image_url`.
        detail: OpenAI's `detail`.
        max_tiles: The request's `max_dynamic_patch`, None if it is not set.
        router: Router settings for its tiles.
    """

    location: str
    detail: str
    max_tiles: int | None
    router: pb.Router

    def tiling(self, checkpoint: embeddings_pb2.CheckpointDescription, max_tiles: int | None) -> pb.Tiling:
        """Return the bounds of the image's tile grid.

        Args:
            checkpoint: The checkpoint's own bounds.
            max_tiles: The operator's bound, None for the checkpoint's.

        Raises:
            InvalidRequest: The request asks for more tiles than the operator allows.
        """
        allowed = max_tiles or checkpoint.max_tiles
        if self.max_tiles is not None and self.max_tiles > allowed:
            hint = f"{allowed} is this server's maximum (--max-tiles)."
            raise unexpected_value(
                f"{self.location}.max_dynamic_patch", f"an integer from 1 to {allowed}", self.max_tiles, hint
            )
        default = allowed if self.detail == "original" else min(checkpoint.max_tiles, allowed)
        upper = 1 if self.detail == "low" else self.max_tiles or default
        lower, upper = resolve_tile_bounds(0, upper, checkpoint.min_tiles, checkpoint.max_tiles)
        return pb.Tiling(min_tiles=lower, max_tiles=upper)


def parse_image_options(part: Mapping[str, Any], location: str, router: pb.Router, policy: RequestPolicy) -> ImageOptions:
    """Parse the options of an image.

    Args:
        part: The object that holds the options.
        location: Where `part` is in the body.
        router: The request's default for the router.
        policy: What the operator allows.

    Raises:
        InvalidRequest: An option has an invalid value.
    """
    detail, max_tiles = _parse_detail(part.get("detail"), location), _parse_max_tiles(part.get("max_dynamic_patch"), location)
    if detail == "low" and max_tiles not in (None, 1):
        param = f"{location}.max_dynamic_patch"
        raise errors.InvalidRequest(f"{param} {max_tiles} contradicts detail low, which is one tile: omit one.", param=param)
    return ImageOptions(location, detail, max_tiles, parse_router(part.get("vir"), router, policy, f"{location}.vir"))


def parse_router(value: Any, default: pb.Router, policy: RequestPolicy, location: str = "vir") -> pb.Router:
    """Parse `vir`, an object or a mode alone; fields that it omits are taken from `default`. Raises `InvalidRequest`."""
    if value is None:
        return default
    if not policy.allow_vir:
        raise errors.InvalidRequest(f"{location} is disabled on this server (--allow-vir=false): omit it.", param=location)
    if isinstance(value, str) and value in _MODES:
        value = {"mode": value}
    if not isinstance(value, dict):
        expected = f"{', '.join(_MODES)}, or an object"
        raise unexpected_value(location, expected, value, 'for example {"mode": "off"}.')
    check_keys(value, ("mode", *_THRESHOLDS), location, allow_null=False)
    fields = {name: field_value for name, field_value in value.items() if field_value is not None}
    mode = pb.Router.Mode.Name(default.mode).lower()
    if "mode" in fields:
        mode = _parse_choice(_MODES, fields["mode"], f"{location}.mode")
    thresholds = {name: _parse_threshold(fields[name], f"{location}.{name}") for name in _THRESHOLDS if name in fields}
    if mode == "auto":
        thresholds = {name: getattr(default, name) for name in _THRESHOLDS if default.HasField(name)} | thresholds
    elif thresholds:
        name, threshold = next(iter(thresholds.items()))
        raise errors.InvalidRequest(
            f'{location}.{name} {threshold} requires mode auto, but the mode is {mode}: omit it, or send "mode": "auto".',
            param=f"{location}.{name}",
        )
    return pb.Router(mode=mode.upper(), **thresholds)


def check_keys(
    value: Mapping[str, Any],
    known: Collection[str],
    location: str,
    elsewhere: Mapping[str, str] | None = None,
    allow_null: bool = True,
) -> None:
    """Check that an object of the request has no unknown key.

    Args:
        value: The object.
        known: Its keys.
        location: Where it is in the body; empty for the body itself.
        elsewhere: Keys that belong to another object, and how to write them there, for the hint.
        allow_null: Accept unknown keys without a value, which some clients send.

    Raises:
        InvalidRequest: A key is unknown. The message suggests the nearest known one.
    """
    unknown = [key for key, item in value.items() if key not in known and not (allow_null and item is None)]
    if not unknown:
        return
    name = min(unknown)[:100]
    param = f"{location}.{name}" if location else name
    candidates = {key: key for key in known} | dict(elsewhere or {})
    near = difflib.get_close_matches(_OTHER_NAMES.get(name, name), candidates, n=1)
    hint = f"did you mean {candidates[near[0]]}?" if near else f"expected {', '.join(known)}."
    raise errors.InvalidRequest(f"{param} is not a known field; {hint}", param=param)


def unexpected_value(param: str, expected: str, value: Any, hint: str) -> errors.InvalidRequest:
    """Return the error for a parameter with another value than `expected`."""
    return errors.InvalidRequest(f"{param}: expected {expected}, not {json_body.quote(value)}; {hint}", param=param)


def _parse_detail(value: Any, location: str) -> str:
    return "auto" if value is None else _parse_choice(_DETAILS, value, f"{location}.detail")


def _parse_max_tiles(value: Any, location: str) -> int | None:
    if value is None:
        return None
    if type(value) is not int or not 1 <= value <= MAX_TILES:  # bool is a subclass of int
        hint = "omit it for the checkpoint's default."
        raise unexpected_value(f"{location}.max_dynamic_patch", f"an integer from 1 to {MAX_TILES}", value, hint)
    return value


def _parse_choice(choices: tuple[str, ...], value: Any, location: str) -> str:
    if not isinstance(value, str) or value not in choices:
        raise unexpected_value(location, f"one of {', '.join(choices)}", value, "omit it for the server's default.")
    return value


def _parse_threshold(value: Any, location: str) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1:  # bool is a subclass of int
        raise unexpected_value(location, "a number from 0 to 1", value, "omit it for the server's default.")
    return float(value)

"""What a caller may say of an image: into how many tiles it is cut at most, and what the router does with them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from common import errors
from common.tiling import MAX_TILES, resolve_tile_bounds
from protos import embeddings_pb2
from protos import vision_pb2 as pb

_MODES = ("auto", "off", "all")
_THRESHOLDS = ("relative_threshold", "absolute_threshold")
_DETAILS = ("low", "high", "original", "auto")


@dataclass(frozen=True)
class Allowed:
    """What the operator allows callers, and what the router does where they say nothing."""

    max_images: int
    router: pb.Router = field(default_factory=pb.Router)
    vir: bool = True


@dataclass(frozen=True)
class Dial:
    """An image's setting. `where` is the place of its words, for errors; `max_tiles` None: nothing was said."""

    where: str
    detail: str
    max_tiles: int | None
    router: pb.Router

    def tiling(self, own: embeddings_pb2.CheckpointDescription, allowed: int | None) -> pb.Tiling:
        """The bounds of its grid. Raises `InvalidRequest` where more was asked for than `allowed`, or the checkpoint's own."""
        most = allowed or own.max_tiles
        if self.max_tiles is not None and self.max_tiles > most:
            param = f"{self.where}.max_dynamic_patch"
            raise errors.InvalidRequest(f"{param} {self.max_tiles} is above {most}, the most that is served here", param=param)
        usual = most if self.detail == "original" else min(own.max_tiles, most)
        chosen = 1 if self.detail == "low" else self.max_tiles or usual
        least, chosen = resolve_tile_bounds(0, chosen, own.min_tiles, own.max_tiles)
        return pb.Tiling(min_tiles=least, max_tiles=chosen)


def read_dial(given: Mapping[str, Any], where: str, router: pb.Router, allowed: Allowed) -> Dial:
    """The words of an image at `where` in the body; `router` is the request's own. Raises `InvalidRequest`."""
    detail, most = _detail(given.get("detail"), where), _max_tiles(given.get("max_dynamic_patch"), where)
    if detail == "low" and most not in (None, 1):
        param = f"{where}.max_dynamic_patch"
        raise errors.InvalidRequest(f"{param} {most}: detail low is one tile; leave out one of the two", param=param)
    return Dial(where, detail, most, read_router(given.get("vir"), router, allowed, f"{where}.vir"))


def read_router(given: Any, own: pb.Router, allowed: Allowed, where: str = "vir") -> pb.Router:
    """What `vir` says, and where it says nothing what holds without it. Raises `InvalidRequest`."""
    if given is None:
        return own
    if not allowed.vir:
        raise errors.InvalidRequest(f"{where} is not accepted from callers here: leave it out", param=where)
    if not isinstance(given, dict):
        raise errors.InvalidRequest(f'{where} must be an object such as {{"mode": "off"}}, not {shown(given)}', param=where)
    if unknown := given.keys() - {"mode", *_THRESHOLDS}:
        known = ", ".join(("mode", *_THRESHOLDS))
        raise errors.InvalidRequest(f"{where} has no field {shown(min(unknown))}; expected {known}", param=where)
    said = {name: value for name, value in given.items() if value is not None}
    mode = _one_of(_MODES, said["mode"], f"{where}.mode") if "mode" in said else pb.Router.Mode.Name(own.mode).lower()
    thresholds = {name: _threshold(said[name], f"{where}.{name}") for name in _THRESHOLDS if name in said}
    if mode == "auto":
        thresholds = {name: getattr(own, name) for name in _THRESHOLDS if own.HasField(name)} | thresholds
    elif thresholds:
        name, value = next(iter(thresholds.items()))
        raise errors.InvalidRequest(
            f'{where}.{name} {value} is only for mode auto, and the mode is {mode}: leave it out, or send "mode": "auto"',
            param=f"{where}.{name}",
        )
    return pb.Router(mode=mode.upper(), **thresholds)


def _detail(value: Any, where: str) -> str:
    return "auto" if value is None else _one_of(_DETAILS, value, f"{where}.detail")


def _max_tiles(value: Any, where: str) -> int | None:
    if value is None:
        return None
    if type(value) is not int or not 1 <= value <= MAX_TILES:  # a bool is an int, but no number of tiles
        param = f"{where}.max_dynamic_patch"
        raise errors.InvalidRequest(
            f"{param} {shown(value)} is not a whole number from 1 to {MAX_TILES}; leave it out for the checkpoint's own",
            param=param,
        )
    return value


def _one_of(known: tuple[str, ...], value: Any, where: str) -> str:
    if not isinstance(value, str) or value not in known:
        said = f"{where} {shown(value)} is not one of {', '.join(known)}; leave it out for the server's own"
        raise errors.InvalidRequest(said, param=where)
    return value


def _threshold(value: Any, where: str) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1:  # a bool is an int, but no threshold
        said = f"{where} {shown(value)} is not a number from 0 to 1; leave it out for the server's own"
        raise errors.InvalidRequest(said, param=where)
    return float(value)


def shown(value: Any) -> str:
    """A value for a message: cut, and only the type of what may be deep."""
    return type(value).__name__ if isinstance(value, list | dict) else repr(value)[:100]

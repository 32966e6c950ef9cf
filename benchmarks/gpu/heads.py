"""Tiles/s of what follows the tower: the router (ViR) and the two projectors."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.gpu.kit import Kit, Measurement
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.timing import measure_seconds, rate
from benchmarks.gpu.towers import dtype_of, randomize
from vision_worker.models.internvl import build_compressing_projector, build_projector, pixel_shuffle
from vision_worker.models.vir import Gating, Pooling

_RATIO = 0.5
_SECONDS_PER_MEASUREMENT = 1.0
_TILES = 32
"""Tiles that a vision worker gives to router and projectors at a time."""

Head = Callable[[Tensor], Tensor]


def measurements(kit: Kit, shape: Shape) -> Iterator[Measurement]:
    """Yield a measurement each of the router and of the projectors to 256 and to 64 tokens."""
    heads: tuple[tuple[str, Callable[[Kit, Shape], Head]], ...] = (
        ("router", _router), ("projector to 256 tokens", _projector), ("projector to 64 tokens", _compressing_projector)
    )  # fmt: skip
    for name, build in heads:
        yield Measurement(f"{name} {shape.name}, {_TILES} tiles", 6, functools.partial(_measure, kit, shape, build))


def _measure(kit: Kit, shape: Shape, build: Callable[[Kit, Shape], Head]) -> dict[str, Any]:
    features = torch.randn(_TILES, shape.patches, shape.tower.hidden_size, device=kit.device, dtype=dtype_of(kit.device))
    head = build(kit, shape)
    with torch.inference_mode():
        seconds = measure_seconds(lambda: head(features), kit.device, 0.0 if kit.dry else _SECONDS_PER_MEASUREMENT)
    figures = rate(_TILES, seconds)
    return {"tiles/s": figures["per second"], "spread": figures["spread"]}


def _router(kit: Kit, shape: Shape) -> Head:
    return _place(nn.Sequential(Pooling(shape.tower.hidden_size), Gating(shape.tower.hidden_size)), kit)


def _projector(kit: Kit, shape: Shape) -> Head:
    projector = _place(build_projector(round(shape.tower.hidden_size / _RATIO**2), shape.width), kit)
    return lambda features: projector(pixel_shuffle(features, _RATIO, "v2"))


def _compressing_projector(kit: Kit, shape: Shape) -> Head:
    projector = _place(build_compressing_projector(round(4 * shape.tower.hidden_size / _RATIO**2), shape.width), kit)
    return lambda features: projector(pixel_shuffle(features, _RATIO / 2, "v2"))


def _place(module: nn.Module, kit: Kit) -> Head:
    return cast(Head, randomize(module).to(kit.device, dtype_of(kit.device)))

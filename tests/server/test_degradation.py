"""Levels rise with the wait and fall slowly, and what they change stays within the operator's bounds."""

from typing import Any

import pytest

from protos import vision_pb2 as pb
from protos.embeddings_pb2 import FLOAT32
from server.config import GatewayOptions
from server.degradation import MAX_LEVEL, Degradation
from server.keys import EncodeSetting
from server.metrics import Metrics
from tests.server.fakes.vision_worker import checkpoint_description

CHECKPOINT = checkpoint_description(relative_threshold=0.75)
AUTO = pb.Router(mode=pb.Router.AUTO)


class Clock:
    """Monotonic time that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make(clock: Clock, **options: Any) -> Degradation:
    addresses: dict[str, Any] = {"vision_workers": ["unix:/a"], "language_workers": ["unix:/b"]}
    return Degradation(GatewayOptions(**addresses, **{"degrade_after": 1.0, **options}), Metrics(), clock)


def at_level(level: int, **options: Any) -> Degradation:
    clock = Clock()
    degradation = make(clock, **options)
    while degradation.level < level:
        clock.now += 1
        degradation.update(100.0)
    return degradation


def setting(router: pb.Router = AUTO, max_tiles: int = 12, min_tiles: int = 1) -> EncodeSetting:
    return EncodeSetting("f" * 64, pb.Tiling(min_tiles=min_tiles, max_tiles=max_tiles), router, FLOAT32)


def test_it_is_off_by_default() -> None:
    clock = Clock()
    degradation = make(clock, degrade_after=None)
    for _ in range(10):
        clock.now += 10
        degradation.update(1000.0)
    assert degradation.apply(setting(), CHECKPOINT) == (setting(), None)


def test_levels_rise_one_by_one_with_the_wait() -> None:
    clock = Clock()
    degradation = make(clock)
    levels = []
    for wait in (0.9, 1.0, 1.0, 2.5, 2.5, 9.0, 9.0, 9.0):
        clock.now += 1
        degradation.update(wait)
        levels.append(degradation.level)
    assert levels == [0, 1, 1, 2, 2, 3, 4, 4]


def test_a_burst_of_requests_raises_one_level_at_a_time() -> None:
    clock = Clock()
    degradation = make(clock)
    clock.now = 10
    for _ in range(100):
        degradation.update(100.0)
    assert degradation.level == 1


def test_levels_fall_only_after_the_load_was_low_for_a_while() -> None:
    degradation = at_level(2)
    clock = degradation._clock
    assert isinstance(clock, Clock)
    for wait in (1.5, 1.5, 1.5, 0.1, 1.5, 0.1):  # between half of the level's wait and the next level: it stays
        clock.now += 3
        degradation.update(wait)
    assert degradation.level == 2
    clock.now += 3
    degradation.update(0.1)
    assert degradation.level == 1
    clock.now += 4
    degradation.update(0.1)
    assert degradation.level == 1, "each level takes its time"
    for _ in range(3):
        clock.now += 3
        degradation.update(0.0)
    assert degradation.level == 0


@pytest.mark.parametrize(
    ("level", "threshold", "max_tiles"), [(0, None, None), (1, 0.5, None), (2, 0.25, None), (3, 0.25, 6), (4, 0.25, 4)]
)
def test_compression_rises_before_tiles_are_saved(level: int, threshold: float | None, max_tiles: int | None) -> None:
    applied, change = at_level(level).apply(setting(), CHECKPOINT)
    assert applied.tiling.max_tiles == (max_tiles or 12)
    assert applied.router.HasField("relative_threshold") == (threshold is not None)
    if change is None:
        assert level == 0
    else:
        assert (change.level, change.relative_threshold, change.max_tiles) == (level, threshold, max_tiles)
        assert applied.digest() != setting().digest(), "another key"


def test_the_header_has_what_was_changed() -> None:
    _, change = at_level(3).apply(setting(), CHECKPOINT)
    assert change is not None
    assert change.header() == "level=3; relative_threshold=0.25; max_tiles=6"


@pytest.mark.parametrize("mode", [pb.Router.OFF, pb.Router.ALL])
def test_routes_that_the_caller_has_fixed_stay(mode: pb.Router.Mode) -> None:
    applied, _ = at_level(MAX_LEVEL).apply(setting(pb.Router(mode=mode)), CHECKPOINT)
    assert applied.router == pb.Router(mode=mode)


def test_a_checkpoint_without_router_only_saves_tiles() -> None:
    plain = checkpoint_description(compressed_tokens_per_tile=0)
    assert at_level(2).apply(setting(), plain) == (setting(), None)
    applied, change = at_level(4).apply(setting(), plain)
    assert change is not None
    assert (applied.router, applied.tiling.max_tiles) == (AUTO, 4)


def test_the_operators_bounds_hold() -> None:
    degradation = at_level(MAX_LEVEL, degrade_threshold=0.9, degrade_tiles=12)
    assert degradation.apply(setting(), CHECKPOINT) == (setting(), None), "they allow nothing"
    few = setting(max_tiles=1)
    applied, _ = at_level(MAX_LEVEL).apply(few, CHECKPOINT)
    assert applied.tiling.max_tiles == 1


def test_a_minimum_of_tiles_is_lowered_with_the_maximum() -> None:
    applied, _ = at_level(MAX_LEVEL).apply(setting(min_tiles=8), CHECKPOINT)
    assert (applied.tiling.min_tiles, applied.tiling.max_tiles) == (4, 4)

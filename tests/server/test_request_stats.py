"""What one request came to."""

import re

import pytest

from protos import vision_pb2 as pb
from server.request_stats import RequestStats


def test_server_timing_is_in_milliseconds_and_in_order() -> None:
    stats = RequestStats("a")
    stats.add_stage("fetch", 0.0015)
    stats.add_stage("vision", 0.25)
    stats.add_vision_timings(pb.Timings(decode=0.01, encode=0.2))
    said = re.fullmatch(r"(.*), total;dur=\d+\.\d", stats.server_timing())
    assert said
    assert said[1] == (
        "fetch;dur=1.5, vision;dur=250.0, wait;dur=0.0, decode;dur=10.0, tile;dur=0.0, queue;dur=0.0, encode;dur=200.0, "
        "route;dur=0.0, deliver;dur=0.0"
    )


def test_a_stage_that_comes_twice_adds_up_and_images_side_by_side_do_not() -> None:
    stats = RequestStats("a")
    for seconds in (0.2, 0.1):
        stats.add_stage("engine", seconds)
        stats.add_vision_timings(pb.Timings(encode=seconds))
    assert stats.stages["engine"] == pytest.approx(0.3)
    assert stats.vision_stages["encode"] == pytest.approx(0.2)


def test_the_engine_has_it_once() -> None:
    stats = RequestStats("a")
    stats.mark_sent_to_engine()
    first = stats.seconds_to_engine
    stats.mark_sent_to_engine()
    assert stats.seconds_to_engine == first


@pytest.mark.parametrize(
    ("images", "cache"),
    [
        ({}, None),
        ({"images": 2, "reused": 0}, "miss"),
        ({"images": 2, "reused": 1}, "part"),
        ({"images": 2, "reused": 2}, "hit"),
    ],
)
def test_what_the_cache_gave(images: dict[str, int], cache: str | None) -> None:
    assert RequestStats("a", images=images).cache_result == cache

"""Statistics of one request."""

import re

import pytest

from protos import vision_pb2 as pb
from server.request_stats import RequestStats


def test_server_timing_is_in_milliseconds_and_in_order() -> None:
    stats = RequestStats("a")
    stats.add_stage("fetch", 0.0015)
    stats.add_stage("vision", 0.25)
    stats.add_vision_timings(pb.Timings(decode=0.01, encode=0.2))
    match = re.fullmatch(r"(.*), total;dur=\d+\.\d", stats.server_timing())
    assert match
    assert match[1] == (
        "fetch;dur=1.5, vision;dur=250.0, wait;dur=0.0, decode;dur=10.0, tile;dur=0.0, queue;dur=0.0, encode;dur=200.0, "
        "route;dur=0.0, deliver;dur=0.0"
    )


def test_repeated_stages_add_up_and_vision_stages_take_the_maximum() -> None:
    stats = RequestStats("a")
    for seconds in (0.2, 0.1):
        stats.add_stage("engine", seconds)
        stats.add_vision_timings(pb.Timings(encode=seconds))
    assert stats.stages["engine"] == pytest.approx(0.3)
    assert stats.vision_stages["encode"] == pytest.approx(0.2)


def test_only_the_first_attempt_counts_as_the_time_to_the_engine() -> None:
    stats = RequestStats("a")
    stats.mark_sent_to_engine()
    first = stats.seconds_to_engine
    stats.mark_sent_to_engine()
    assert stats.seconds_to_engine == first


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ({}, None),
        ({"images": 2, "reused": 0}, "miss"),
        ({"images": 2, "reused": 1}, "part"),
        ({"images": 2, "reused": 2}, "hit"),
    ],
)
def test_the_cache_result_summarises_reused_images(images: dict[str, int], expected: str | None) -> None:
    assert RequestStats("a", images=images).cache_result == expected

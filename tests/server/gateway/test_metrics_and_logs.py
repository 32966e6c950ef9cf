"""Metrics, Server-Timing and the access log."""

import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.server.fakes.handlers import abort_connection, error_response, event_stream, hang, in_turn
from tests.server.fakes.requests import chat, image_part
from tests.server.fakes.stack import Stack
from tests.server.fakes.vision_worker import visual_token_count
from tests.server.fakes.vllm import EVENTS, METRICS
from tests.server.fakes.waiting import wait_until
from tests.server.gateway.helpers import A, B, C, assert_serves_images


async def test_requests_are_counted_in_metrics(stack: Stack) -> None:
    for body in (chat("a"), chat(image_part(A), image_part(B)), chat(image_part(A), stream=True), chat(image_part("x"))):
        await stack.post(body)
    await stack.get("/nowhere")
    expected = {
        "dvd_images_total": 3,
        "dvd_encodes_total": 2,
        'dvd_cache_events_total{event="hits",tier="sink"}': 1,
        'dvd_cache_events_total{event="misses",tier="sink"}': 2,
        "dvd_visual_tokens_total": 2 * visual_token_count(A) + visual_token_count(B),
        'dvd_tiles_total{resolution="full"}': 2,
        'dvd_tiles_total{resolution="compressed"}': 2,
        'dvd_requests_total{code="200",route="/v1/chat/completions"}': 3,
        'dvd_requests_total{code="400",route="/v1/chat/completions"}': 1,
        'dvd_requests_total{code="404",route="other"}': 1,
        f'dvd_worker_up{{address="{stack.vision.address}",kind="vision"}}': 1,
        f'dvd_worker_up{{address="{stack.sink.address}",kind="language"}}': 1,
        'dvd_stage_seconds_count{stage="receive"}': 4,
        'dvd_stage_seconds_count{stage="fetch"}': 3,
        'dvd_stage_seconds_count{stage="lookup"}': 2,
        'dvd_stage_seconds_count{stage="vision"}': 1,
        'dvd_stage_seconds_count{stage="engine"}': 3,
        'dvd_stage_seconds_count{stage="stream"}': 1,
        "dvd_time_to_engine_seconds_count": 3,
        "dvd_time_to_first_token_seconds_count": 1,
        "dvd_inter_token_seconds_count": 0,
        'dvd_request_seconds_count{route="/v1/chat/completions"}': 3,
        "dvd_image_tiles_count": 2,
        "dvd_image_tiles_sum": 4,
        "dvd_visual_tokens_saved_total": 3 * 192,
        'dvd_errors_total{code="invalid_request"}': 2,
    }
    await stack.wait_until_idle()
    text = (await stack.get("/metrics")).body.decode().splitlines()
    samples = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text if not line.startswith("#")}
    assert {name: samples.get(name) for name in expected} == expected


async def test_vllm_metrics_are_forwarded_and_summarised(stack: Stack) -> None:
    stack.engine.metrics = METRICS
    whole = await stack.get("/metrics/engine/0")
    assert (whole.status, whole.body.decode()) == (200, METRICS)
    assert whole.headers["Content-Type"].startswith("text/plain")
    for name, value in (("requests_waiting", 8), ("requests_running", 5), ("kv_cache_usage", 0.5)):
        await stack.wait_for_metric(f"dvd_engine_{name}", value)
    stack.engine.metrics = "vllm:num_requests_waiting 3\n"  # another version: an incomplete set is not shown
    await wait_until(metric_is_absent(stack, "dvd_engine_requests_waiting{"), "unknown metrics are not shown")
    await assert_serves_images(stack)
    await stack.language_workers[0].stop()
    assert (await stack.get("/metrics/engine/0")).status == 503


def metric_is_absent(stack: Stack, line: str) -> Callable[[], Awaitable[bool]]:
    """Returns a condition for wait_until: the metrics have no such line."""

    async def is_absent() -> bool:
        return line not in (await stack.get("/metrics")).body.decode()

    return is_absent


@pytest.mark.parametrize("index", ["1", "-1", "x", "9" * 30, "%C2%B2", "0000000001", "0" * 5000])
async def test_metrics_of_a_language_worker_that_does_not_exist_are_rejected(shared_stack: Stack, index: str) -> None:
    response = await shared_stack.get(f"/metrics/engine/{index}")
    assert (response.status, response.error["code"]) == (400, "invalid_request")
    assert "expected a number from 0 to 0" in response.error["message"]


@pytest.mark.parametrize(
    ("body", "stages"),
    [
        (chat("a"), ["receive", "engine", "total"]),
        (chat("a", stream=True), ["receive", "engine", "total"]),
        (b"{", ["receive", "total"]),
        (chat(image_part("data:,")), ["receive", "fetch", "total"]),
    ],
    ids=["text", "stream", "not JSON", "not an image"],
)
async def test_every_response_has_server_timing(shared_stack: Stack, body: Any, stages: list[str]) -> None:
    timing = (await shared_stack.post(body)).headers["Server-Timing"]
    assert re.fullmatch(r"[a-z]+;dur=\d+\.\d(, [a-z]+;dur=\d+\.\d)*", timing)
    assert [stage.partition(";")[0] for stage in timing.split(", ")] == stages
    assert "total;dur=" in (await shared_stack.get("/health/live")).headers["Server-Timing"]


async def test_errors_are_counted_by_code(stack: Stack) -> None:
    stack.engine.respond = in_turn(
        error_response(500), error_response(400), event_stream(EVENTS[0], EVENTS[1], then=abort_connection), hang
    )
    for body in (chat("a"), chat("a"), chat("a", stream=True), b"{"):
        await stack.post(body)
    _, writer = await stack.start_chat(chat("a"))
    await wait_until(lambda: len(stack.engine.requests) == 4, "the engine has the request")
    writer.close()
    await stack.wait_until_idle()
    for code, count in (("engine_error", 1), ("invalid_request", 2), ("unavailable", 1), ("client_gone", 1)):
        await stack.wait_for_metric(f'dvd_errors_total{{code="{code}"', count)
    assert await stack.metric("dvd_errors_total") == 5
    assert await stack.metric("dvd_request_seconds_count") == 0, "failed requests have no latency"
    assert await stack.metric("dvd_stage_requests") == 0


async def test_each_request_is_logged_once(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "dvd.access")
    await stack.chat(image_part(A), image_part(B))
    await stack.chat(image_part(A), image_part(C))
    await stack.chat(image_part("data:,"))
    await stack.get("/nowhere/a-secret")
    await stack.get("/health/live")
    lines = [record.__dict__["fields"] for record in caplog.records if record.name == "dvd.access"]
    summaries = [{name: line.get(name) for name in ("route", "status", "images", "cache", "error")} for line in lines]
    route = "/v1/chat/completions"
    expected = [
        (route, 200, 2, "miss", None), (route, 200, 2, "part", None), (route, 400, None, None, "invalid_image"),
        ("other", 404, None, None, "invalid_request"), ("/health/live", 200, None, None, None),
    ]  # fmt: skip
    assert [tuple(line.values()) for line in summaries] == expected
    assert lines[0]["tokens"] == visual_token_count(A) + visual_token_count(B)
    levels = [record.levelname for record in caplog.records if record.name == "dvd.access"]
    assert levels == ["INFO"] * 4 + ["DEBUG"], "probes are logged at DEBUG"

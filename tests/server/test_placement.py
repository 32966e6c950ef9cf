"""Placement of embeddings: what the gateway's tests do not show, such as lookups that fail and bounds of memory."""

import dataclasses
import math
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from common import errors
from common.digest import digest
from common.tracing import Trace
from protos import vision_pb2 as pb
from server import encode_calls
from server.apis.image_options import ImageOptions
from server.apis.request import ImagePart, ParsedRequest
from server.config import GatewayOptions
from server.http.error_format import OPENAI
from server.media.image_file import ImageFile
from server.metrics import Metrics
from server.placement import EmbeddingPlacer, EngineRequest, ImageReport
from server.request_context import RequestContext
from server.request_stats import RequestStats
from server.retry import RetryBudget
from server.vision_queue import VisionQueue
from server.workers.probes import WorkerPools
from tests.server.fakes.language_worker import FakeLanguageWorker
from tests.server.fakes.requests import image_file
from tests.server.fakes.vision_worker import FakeVisionWorker
from tests.server.workers.helpers import start_pools

FILES = [ImageFile(image_file(i), digest(image_file(i)), (8, 8)) for i in range(3)]
OPTIONS = ImageOptions("images[0]", "auto", None, pb.Router())


class PlacerStack:
    """A placer in front of one fake worker of each kind, and the context of one request."""

    def __init__(self, workers: WorkerPools, vision: FakeVisionWorker, language: FakeLanguageWorker) -> None:
        self.workers, self.vision, self.language, self.metrics = workers, vision, language, Metrics()
        addresses: dict[str, Any] = {"vision_workers": [vision.address], "language_workers": [language.sink.address]}
        options = GatewayOptions(**addresses)
        queue = VisionQueue(workers.vision, options.max_queue_seconds, self.metrics)
        budget = RetryBudget(options.retry_share, self.metrics)
        self.placer = EmbeddingPlacer(options, workers, queue, budget, self.metrics, Trace(None, "gateway"))
        self.stats = RequestStats("request")
        self.resources = AsyncExitStack()
        self.context = RequestContext(b"caller", "flow", "/v1/x", OPENAI, self.stats, time.monotonic() + 60, self.resources)

    async def place(self, *files: ImageFile) -> EngineRequest:
        return await self.placer.place(self.request(*files), files, self.context, [])

    def request(self, *files: ImageFile) -> ParsedRequest:
        images = [ImagePart(("images", i), "", OPTIONS) for i in range(len(files))]
        return ParsedRequest(b"{}", {"images": [{}] * len(files)}, images)


@pytest.fixture
async def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[PlacerStack]:
    async with start_pools(tmp_path, monkeypatch) as (workers, vision, language):
        running = PlacerStack(workers, vision, language)
        async with running.resources:
            yield running


def test_the_report_header_lists_all_fields() -> None:
    report = ImageReport(images=2, tiles=14, tokens=20, encoded=2)
    assert report.header() == "images=2; tiles=14; compressed=0; tokens=20; reused=0; shared=0; encoded=2"


async def test_a_request_without_images_needs_no_vision_worker(stack: PlacerStack) -> None:
    request = await stack.place()
    assert (request.keys, request.body) == ([], b"{}")
    assert stack.vision.calls == []


async def test_the_report_counts_reused_shared_and_encoded_embeddings(stack: PlacerStack) -> None:
    first = await stack.place(FILES[0])
    assert first.report == ImageReport(images=1, tiles=2, compressed=1, tokens=first.image_tokens, encoded=1)
    stack.vision.cached = True
    second = await stack.place(FILES[0], FILES[1])
    assert second.report == ImageReport(
        images=2, tiles=4, compressed=2, tokens=second.image_tokens, reused=1, shared=1
    )  # fmt: skip
    assert second.keys[0] == first.keys[0]
    assert set(second.keys) == set(stack.language.sink.rows)


async def test_equal_images_are_encoded_once(stack: PlacerStack) -> None:
    request = await stack.place(FILES[0], FILES[1], FILES[0])
    assert request.keys[0] == request.keys[2] != request.keys[1]
    assert len(stack.vision.images) == 2


async def test_the_language_worker_is_in_use_until_the_resources_are_released(stack: PlacerStack) -> None:
    request = await stack.place(FILES[0])
    assert request.language.is_in_use
    await stack.resources.aclose()
    assert not request.language.is_in_use


async def test_a_sink_that_does_not_answer_a_lookup_marks_its_worker_down(stack: PlacerStack) -> None:
    await stack.language.sink.stop()
    with pytest.raises(errors.WorkerUnavailable, match="does not answer"):
        await stack.place(FILES[0])
    assert stack.workers.language.available() == []
    assert stack.metrics.registry.get_sample_value("dvd_cache_events_total", {"tier": "sink", "event": "errors"}) == 1


async def test_an_embedding_is_lost_if_the_sink_has_evicted_it(stack: PlacerStack) -> None:
    request = await stack.place(FILES[0], FILES[1])
    assert not await stack.placer.lost_embedding(request)
    del stack.language.sink.rows[request.keys[1]]
    assert await stack.placer.lost_embedding(request)
    assert not await stack.placer.lost_embedding(await stack.place())
    await stack.language.sink.stop()
    assert not await stack.placer.lost_embedding(request), "the sink cannot be asked"


async def test_the_oldest_routes_are_forgotten(stack: PlacerStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_calls, "_MAX_REMEMBERED_ROUTES", 2)
    for file in FILES:
        await stack.placer.route(stack.request(file), [file], stack.context)
    assert len(stack.vision.calls) == 3
    await stack.placer.route(stack.request(FILES[2]), [FILES[2]], stack.context)
    assert len(stack.vision.calls) == 3
    await stack.placer.route(stack.request(FILES[0]), [FILES[0]], stack.context)
    assert len(stack.vision.calls) == 4
    assert all(call.dry_run for call in stack.vision.calls)


async def test_without_a_deadline_an_image_is_expected_for_a_day(stack: PlacerStack) -> None:
    stack.context = dataclasses.replace(stack.context, deadline=math.inf)
    await stack.placer._lookup(stack.workers.language.workers[0], ["a"], stack.context)
    assert stack.language.sink.expect_seconds == [86_400.0]

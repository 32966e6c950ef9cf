"""Health, models and version, and what readiness says of workers that are missing, slow or of another checkpoint."""

from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from server.workers import probes
from tests.server.fakes.requests import image_part
from tests.server.fakes.stack import Stack, start_stack
from tests.server.fakes.vision_worker import checkpoint_description
from tests.server.fakes.vllm import MODEL
from tests.server.fakes.waiting import wait_until
from tests.server.gateway.helpers import A, assert_serves_images


async def test_models_version_and_health(stack: Stack) -> None:
    models = (await stack.get("/v1/models")).json
    assert models == {"object": "list", "data": [{"id": MODEL, "root": MODEL}]}, "the engine's folder is not revealed"
    version = (await stack.get("/version")).json
    assert version["engine"] == "0.0.1"
    assert version["version"]
    assert (await stack.get("/health/live")).json == {"status": "live"}
    assert (await stack.get("/health/ready")).json == {"status": "ready", "reasons": []}
    assert (await stack.get("/health")).status == 200


@pytest.mark.parametrize("name", [MODEL, "org/a model", "a:b@c", "ü", "a%2Fb"])
async def test_a_model_is_described_by_its_id(stack: Stack, name: str) -> None:
    stack.engine.models = {"object": "list", "data": [{"id": "base", "root": "/secret"}, {"id": name, "root": "/secret/a"}]}
    for path in (quote(name, safe=""), quote(name)):
        response = await stack.get(f"/v1/models/{path}")
        assert (response.status, response.json) == (200, {"id": name, "root": name})


@pytest.mark.parametrize("name", ["absent", "", "x" * 3000, "../health", f"{MODEL}/x", MODEL.upper()])
async def test_an_unknown_model_is_not_found(stack: Stack, name: str) -> None:
    response = await stack.get(f"/v1/models/{quote(name, safe='')}")
    assert (response.status, response.error["code"], response.error["param"]) == (404, "model_not_found", "model")
    assert MODEL in response.error["message"]
    assert len(response.body) < 1000


async def test_without_a_vision_worker_images_are_rejected_and_text_is_served(stack: Stack) -> None:
    await stack.vision.stop()
    for _ in range(2):
        response = await stack.chat(image_part(A))
        assert (response.status, response.error["code"]) == (503, "unavailable")
        assert int(response.headers["Retry-After"]) >= 1
        assert (await stack.chat("a")).status == 200
    ready = await stack.wait_until_not_ready()
    assert ready.json == {"status": "not ready", "reasons": ["no vision worker answers"]}
    await stack.vision.start()
    await stack.wait_until_ready()
    await assert_serves_images(stack)


async def test_a_cached_embedding_needs_no_vision_worker(stack: Stack) -> None:
    await assert_serves_images(stack)
    await stack.vision.stop()
    assert (await stack.chat(image_part(A))).status == 200


async def test_without_a_language_worker_requests_are_rejected(stack: Stack) -> None:
    await stack.language_workers[0].stop()
    for content in (["a"], [image_part(A)]):
        response = await stack.chat(*content)
        assert (response.status, response.error["code"]) == (503, "unavailable")
        assert int(response.headers["Retry-After"]) >= 1
        assert b"unix:" not in response.body
    assert (await stack.get("/v1/models")).status == 503
    assert (await stack.get("/health/live")).status == 200
    assert (await stack.wait_until_not_ready()).json["reasons"] == ["no language worker answers"]
    assert (await stack.get("/version")).json["engine"] is None
    await stack.language_workers[0].start()
    await stack.wait_until_ready()
    await assert_serves_images(stack)


async def test_workers_of_different_checkpoints_are_not_combined(stack: Stack) -> None:
    stack.vision.checkpoint = checkpoint_description(fingerprint="e" * 64)
    ready = await stack.wait_until_not_ready()
    (reason,) = ready.json["reasons"]
    assert "e" * 64 in reason
    assert "f" * 64 in reason
    assert f"(vision worker {stack.vision.address})" in reason
    assert f"(language worker {stack.sink.address})" in reason
    response = await stack.chat(image_part(A))
    assert (response.status, response.error["code"]) == (503, "checkpoint_mismatch")
    assert "e" * 64 in response.error["message"]
    assert "f" * 64 in response.error["message"]
    assert b"unix:" not in response.body
    assert (await stack.chat("a")).status == 200
    assert stack.vision.calls == []
    stack.vision.checkpoint = checkpoint_description()
    await stack.wait_until_ready()
    await assert_serves_images(stack)


async def test_an_unknown_dtype_of_a_language_worker_is_reported_as_unavailable(stack: Stack) -> None:
    stack.sink.dtype = 9
    ready = await stack.wait_until_not_ready()
    (reason,) = ready.json["reasons"]
    assert (ready.status, "dtype number 9" in reason, stack.sink.address in reason) == (503, True, True)
    response = await stack.chat(image_part(A))
    assert (response.status, response.error["code"]) == (503, "checkpoint_mismatch")
    assert (await stack.chat("a")).status == 200
    stack.sink.dtype = 3
    await stack.wait_until_ready()
    await assert_serves_images(stack)


@pytest.mark.parametrize(
    ("worker", "reason"), [("vision", "no vision worker answers"), ("sink", "no language worker answers"),
                          ("engine", "no language worker answers")]
)  # fmt: skip
async def test_a_worker_that_hangs_is_not_ready(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, worker: str, reason: str
) -> None:
    monkeypatch.setattr(probes, "PROBE_TIMEOUT_SECONDS", 0.2)
    hanging: Any = getattr(stack, worker)
    hanging.responsive.clear()
    assert (await stack.wait_until_not_ready()).json["reasons"] == [reason]
    hanging.responsive.set()
    await stack.wait_until_ready()
    await assert_serves_images(stack)


async def test_readiness_does_not_wait_for_a_worker_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with start_stack(tmp_path, vision=2) as stack:
        monkeypatch.setattr(probes, "PROBE_TIMEOUT_SECONDS", 3600.0)
        stack.vision.responsive.clear()
        await wait_until(lambda: stack.vision.waiting_probes, "a probe waits for the worker that hangs")
        for _ in range(10):
            assert (await stack.get("/health/ready")).status == 200

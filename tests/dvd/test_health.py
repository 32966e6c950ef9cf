"""`dvd health`: its exit status tells whether a process can do its work."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from common import errors
from dvd.health import check
from protos import embeddings_pb2 as pb
from tests.ports import free_port
from tests.server.fakes.language_worker import FakeLanguageWorker
from tests.server.fakes.stack import start_stack
from tests.server.fakes.vision_worker import FakeVisionWorker


@contextlib.asynccontextmanager
async def running(*workers: FakeVisionWorker | FakeLanguageWorker) -> AsyncIterator[None]:
    for worker in workers:
        await worker.start()
    yield
    for worker in workers:
        await worker.stop()


async def test_a_vision_worker_is_healthy_while_it_answers(tmp_path: Path) -> None:
    vision = FakeVisionWorker(f"127.0.0.1:{free_port()}")
    await vision.start()
    assert await check(vision.address, 20) == "vision worker of InternVL, float32 on cpu"
    vision.responsive.clear()
    with pytest.raises(errors.Unavailable, match="deadline_exceeded"):
        await check(vision.address, 0.2)
    vision.responsive.set()
    await vision.stop()
    with pytest.raises(errors.Unavailable, match=r"no worker answers \(unavailable\)"):
        await check(vision.address, 20)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"draining": True}, "the worker is draining"),
        ({"stalled": "a batch on cpu has used no CPU time for more than 3 s"}, "makes no progress: a batch on cpu has used"),
    ],
)
async def test_a_worker_that_should_get_no_requests_is_not_healthy(tmp_path: Path, state: dict[str, Any], message: str) -> None:
    vision = FakeVisionWorker(f"unix:{tmp_path}/vision")
    language = FakeLanguageWorker(tmp_path, 0)
    async with running(vision, language):
        vision.description = state
        with pytest.raises(errors.Unavailable, match=message):
            await check(vision.address, 20)
        if state.get("draining"):
            language.sink.draining = True
            with pytest.raises(errors.Unavailable, match=message):
                await check(language.sink.address, 20)


async def test_a_language_worker_needs_its_sink_and_vllm(tmp_path: Path) -> None:
    language = FakeLanguageWorker(tmp_path, 0, f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}")
    language.sink.http = language.engine.address.replace("127.0.0.1", "0.0.0.0")
    await language.start()
    assert await check(language.sink.address, 20) == "language worker of InternVL, float32, 0 of 0 MiB of embeddings"
    language.sink.dtype, language.sink.model_dtype = pb.INT8, pb.BFLOAT16
    expected = "language worker of InternVL, bfloat16, 0 of 0 MiB of embeddings in int8"
    assert await check(language.sink.address, 20) == expected
    await language.engine.stop()
    with pytest.raises(errors.Unavailable, match="^vLLM at 127.0.0.1:.* does not answer: .*refused"):
        await check(language.sink.address, 20)
    await language.stop()


async def test_a_gateway_that_is_not_ready_gives_the_reasons(tmp_path: Path) -> None:
    async with start_stack(tmp_path) as stack:
        for path in ("live", "ready"):
            assert await check(f"{stack.url}/health/{path}", 20) == "200"
        await stack.vision.stop()
        assert await check(f"{stack.url}/health/live", 20) == "200", "text requests are still served"
        await stack.wait_until_not_ready()
        with pytest.raises(errors.Unavailable, match="^503 no vision worker answers$"):
            await check(f"{stack.url}/health/ready", 20)
        with pytest.raises(errors.Unavailable, match=r"^404$"):
            await check(f"{stack.url}/nowhere", 20)
    with pytest.raises(errors.Unavailable, match="no gateway answers"):
        await check(f"{stack.url}/health/live", 20)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["127.0.0.1:1"], 1, "dvd health: 127.0.0.1:1: no worker answers"),
        (["vision"], 2, "dvd health: ADDRESS = 'vision': expected HOST:PORT"),
        ([], 2, "dvd health: missing ADDRESS"),
        (["127.0.0.1:1", "--timeout=0"], 2, "dvd health: --timeout = '0'"),
    ],
)
async def test_a_failure_is_one_line_and_an_exit_status(arguments: list[str], status: int, message: str) -> None:
    command = [sys.executable, "-c", "from dvd.cli import main; main()", "health", *arguments]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    out, err = await process.communicate()
    assert (process.returncode, out) == (status, b"")
    assert err.decode().startswith(message)
    assert err.count(b"\n") == 1

"""The gateway as one process, and as several behind one port."""

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tests.server.fakes.gateway import Gateway, start_gateway
from tests.server.fakes.handlers import hang
from tests.server.fakes.requests import chat, image_file, image_part
from tests.server.fakes.stack import Response, start_stack
from tests.server.fakes.vllm import COMPLETION, METRICS
from tests.server.fakes.waiting import wait_until


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    """A gateway of two processes."""
    async with start_stack(tmp_path) as stack, start_gateway(stack, "--workers=2") as running:
        await wait_until(lambda: len(running.serving_pids()) == 2, "two processes serve")
        yield running


async def send_requests(gateway: Gateway, count: int) -> list[Response]:
    return list(await asyncio.gather(*(gateway.chat(image_part(image_file(i % 3))) for i in range(count))))


async def test_two_processes_share_a_port_and_their_metrics(gateway: Gateway) -> None:
    responses = await send_requests(gateway, 40)
    assert {(response.status, response.body) for response in responses} == {(200, COMPLETION)}
    assert await gateway.metric('dvd_requests_total{code="200",route="/v1/chat/completions"') == 40
    assert await gateway.metric("dvd_images_total") == 40
    await gateway.wait_until_idle()
    assert await gateway.metric("dvd_worker_up") == 2, "one vision and one language worker, not one of each for each process"
    assert await gateway.metric("dvd_build_info") == await gateway.metric("dvd_model_info") == 1
    assert await gateway.metric('dvd_stage_seconds_count{stage="engine"') == 40
    assert await gateway.metric('dvd_request_seconds_count{route="/v1/chat/completions"') == 40
    assert await gateway.metric("dvd_stage_requests") == 0
    gateway.engine.metrics = METRICS
    await wait_until(lambda: _metric_is(gateway, "dvd_engine_requests_waiting", 8), "the load of the engine is counted once")
    await gateway.vision.stop()
    line = 'dvd_worker_up{{address="{}",kind="{}"}} {}.0'
    expected = [line.format(gateway.vision.address, "vision", 0), line.format(gateway.sink.address, "language", 1)]
    for _ in range(10):  # whichever process responds

        async def matches() -> bool:
            lines = (await gateway.get("/metrics")).body.decode().splitlines()
            return sorted(line for line in lines if line.startswith("dvd_worker_up")) == sorted(expected)

        await wait_until(matches, "the metrics show the worker that is down")


async def test_a_process_that_is_killed_is_replaced(gateway: Gateway) -> None:
    killed, other = gateway.serving_pids()
    os.kill(killed, signal.SIGKILL)
    await wait_until(lambda: len(gateway.serving_pids()) == 2 and killed not in gateway.serving_pids(), "a new process")
    assert other in gateway.serving_pids()
    await gateway.wait_until_ready()
    assert {response.status for response in await send_requests(gateway, 20)} == {200}


async def test_requests_of_killed_processes_leave_the_metrics(gateway: Gateway) -> None:
    gateway.engine.respond = hang
    requests = [asyncio.create_task(gateway.post(chat("hello"))) for _ in range(30)]
    await wait_until(lambda: _metric_is(gateway, "dvd_requests_in_flight", 30), "all requests are in flight")
    killed = gateway.serving_pids()
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    results = await asyncio.gather(*requests, return_exceptions=True)
    assert all(isinstance(result, aiohttp.ClientError) for result in results)
    await wait_until(
        lambda: len(gateway.serving_pids()) == 2 and not set(gateway.serving_pids()) & set(killed), "new processes"
    )
    await gateway.wait_until_ready()
    await gateway.wait_until_idle()
    assert await gateway.metric("dvd_stage_requests") == 0


async def test_all_log_lines_are_json(tmp_path: Path) -> None:
    async with start_stack(tmp_path) as stack:
        addresses = [f"--vision-workers={stack.vision.address}", f"--language-workers={stack.sink.address}"]
        command = ["-m", "server", "--port=0", "--workers=2", "--log-format=json", "--log-level=debug", *addresses]
        process = await asyncio.create_subprocess_exec(sys.executable, *command, stderr=asyncio.subprocess.PIPE)
        assert process.stderr is not None
        first_line = json.loads(await process.stderr.readline())
        assert (first_line["logger"], first_line["level"]) == ("dvd.gateway", "info")
        assert re.fullmatch(r"listening on http://127.0.0.1:\d+", first_line["message"])
        lines = [json.loads(await process.stderr.readline()) for _ in range(4)]
        process.terminate()
        lines += [json.loads(line) for line in (await process.stderr.read()).splitlines()]
        assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
        assert await process.wait() == 0


async def _metric_is(gateway: Gateway, name: str, value: float) -> bool:
    return await gateway.metric(name) == value


async def test_the_processes_share_the_limit_of_requests(tmp_path: Path) -> None:
    async with start_stack(tmp_path) as stack, start_gateway(stack, "--workers=2", "--max-in-flight=8") as gateway:
        stack.engine.respond = hang
        requests = [asyncio.create_task(gateway.post(chat("hello"))) for _ in range(60)]
        while sum(not task.done() for task in requests) > 8:
            await asyncio.wait(requests, return_when=asyncio.FIRST_COMPLETED, timeout=1)
        assert {task.result().status for task in requests if task.done()} == {429}
        for task in requests:
            task.cancel()
        await asyncio.gather(*requests, return_exceptions=True)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_all_processes(gateway: Gateway, signal_number: int) -> None:
    pids = gateway.serving_pids()
    gateway.process.send_signal(signal_number)
    assert await asyncio.wait_for(gateway.process.wait(), 30) == 0
    await wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "the processes are gone")


async def test_no_process_is_left_when_the_main_process_is_killed(gateway: Gateway) -> None:
    pids = gateway.serving_pids()
    gateway.process.kill()
    await gateway.process.wait()
    await wait_until(lambda: not any(_is_running(pid) for pid in pids), "the processes are gone")


def _is_running(pid: int) -> bool:
    try:
        return " Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]
    except FileNotFoundError:
        return False

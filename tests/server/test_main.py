"""The gateway as a process, and as several."""

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from tests.server.fakes.handlers import hang
from tests.server.fakes.requests import chat, image_file, image_part
from tests.server.fakes.stack import Response, Stack, start_stack
from tests.server.fakes.vllm import COMPLETION
from tests.server.fakes.waiting import wait_until


class Gateway(Stack):
    """One that runs in processes of its own, beside the workers of a stack."""

    process: asyncio.subprocess.Process

    def workers(self) -> list[int]:
        """Its serving processes, by id."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@asynccontextmanager
async def running(stack: Stack, *flags: str) -> AsyncIterator[Gateway]:
    addresses = {
        "vision-workers": ",".join(worker.address for worker in stack.vision_workers),
        "language-workers": ",".join(worker.sink.address for worker in stack.language_workers),
    }
    command = ["-m", "server", "--port=0", *(f"--{name}={value}" for name, value in addresses.items()), *flags]
    process = await asyncio.create_subprocess_exec(sys.executable, *command, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    try:
        said = re.search(rb"listening on http://127.0.0.1:(\d+)", await process.stderr.readline())
        assert said
        draining = asyncio.create_task(process.stderr.read())
        # a connection for each request, so that they spread over the processes
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=60)) as session:
            gateway = Gateway(stack.vision_workers, stack.language_workers, session, int(said[1]))
            gateway.process = process
            await gateway.wait_until_ready()
            yield gateway
        draining.cancel()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[Gateway]:
    async with start_stack(tmp_path) as stack, running(stack, "--workers=2") as gateway:
        await wait_until(lambda: len(gateway.workers()) == 2, "two processes")
        yield gateway


async def asked(gateway: Gateway, count: int) -> list[Response]:
    return list(await asyncio.gather(*(gateway.chat(image_part(image_file(i % 3))) for i in range(count))))


async def test_two_processes_serve_one_port_and_count_as_one(two: Gateway) -> None:
    answers = await asked(two, 40)
    assert {(answer.status, answer.body) for answer in answers} == {(200, COMPLETION)}
    assert await two.metric('dvd_requests_total{code="200",route="/v1/chat/completions"') == 40
    assert await two.metric("dvd_images_total") == 40
    await two.wait_until_idle()
    assert await two.metric("dvd_worker_up") == 2, "one vision and one language worker, however many processes ask"
    assert await two.metric("dvd_build_info") == await two.metric("dvd_model_info") == 1
    assert await two.metric('dvd_stage_seconds_count{stage="engine"') == 40
    assert await two.metric('dvd_request_seconds_count{route="/v1/chat/completions"') == 40
    assert await two.metric("dvd_stage_requests") == 0
    await wait_until(lambda: _is(two, "dvd_engine_requests_waiting", 8), "the engine's, not once for each process")
    await two.vision.stop()
    shown = 'dvd_worker_up{{address="{}",kind="{}"}} {}.0'
    wanted = [shown.format(two.vision.address, "vision", 0), shown.format(two.sink.address, "language", 1)]
    for _ in range(10):  # of whichever process

        async def right() -> bool:
            lines = (await two.get("/metrics")).body.decode().splitlines()
            return sorted(line for line in lines if line.startswith("dvd_worker_up")) == sorted(wanted)

        await wait_until(right, "what is shown is true")


async def test_a_process_that_is_killed_is_replaced(two: Gateway) -> None:
    gone, stays = two.workers()
    os.kill(gone, signal.SIGKILL)
    await wait_until(lambda: len(two.workers()) == 2 and gone not in two.workers(), "another process")
    assert stays in two.workers()
    await two.wait_until_ready()
    assert {answer.status for answer in await asked(two, 20)} == {200}


async def test_requests_of_processes_that_were_killed_are_not_in_flight_for_ever(two: Gateway) -> None:
    two.engine.respond = hang
    waiting = [asyncio.create_task(two.post(chat("hello"))) for _ in range(30)]
    await wait_until(lambda: _is(two, "dvd_requests_in_flight", 30), "all are in flight")
    gone = two.workers()
    for pid in gone:
        os.kill(pid, signal.SIGKILL)
    lost = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(error, aiohttp.ClientError) for error in lost)
    await wait_until(lambda: len(two.workers()) == 2 and not set(two.workers()) & set(gone), "other processes")
    await two.wait_until_ready()
    await two.wait_until_idle()
    assert await two.metric("dvd_stage_requests") == 0


async def test_json_is_all_that_is_said(tmp_path: Path) -> None:
    async with start_stack(tmp_path) as stack:
        addresses = [f"--vision-workers={stack.vision.address}", f"--language-workers={stack.sink.address}"]
        command = ["-m", "server", "--port=0", "--workers=2", "--log-format=json", *addresses]
        process = await asyncio.create_subprocess_exec(sys.executable, *command, stderr=asyncio.subprocess.PIPE)
        assert process.stderr is not None
        first = json.loads(await process.stderr.readline())
        assert (first["logger"], first["level"]) == ("dvd.gateway", "info")
        assert re.fullmatch(r"listening on http://127.0.0.1:\d+", first["message"])
        lines = [json.loads(await process.stderr.readline()) for _ in range(4)]
        process.terminate()
        lines += [json.loads(line) for line in (await process.stderr.read()).splitlines()]
        assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
        assert await process.wait() == 0


async def _is(gateway: Gateway, name: str, value: float) -> bool:
    return await gateway.metric(name) == value


async def test_the_limit_of_requests_is_that_of_all_processes(tmp_path: Path) -> None:
    async with start_stack(tmp_path) as stack, running(stack, "--workers=2", "--max-in-flight=8") as gateway:
        stack.engine.respond = hang
        waiting = [asyncio.create_task(gateway.post(chat("hello"))) for _ in range(60)]
        while sum(not task.done() for task in waiting) > 8:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=1)
        assert {task.result().status for task in waiting if task.done()} == {429}
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_all_processes(two: Gateway, number: int) -> None:
    workers = two.workers()
    two.process.send_signal(number)
    assert await asyncio.wait_for(two.process.wait(), 30) == 0
    await wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), "the processes are gone")


async def test_nobody_is_left_when_the_first_process_is_killed(two: Gateway) -> None:
    workers = two.workers()
    two.process.kill()
    await two.process.wait()
    await wait_until(lambda: not any(_runs(pid) for pid in workers), "the processes are gone")


def _runs(pid: int) -> bool:
    try:
        return " Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]
    except FileNotFoundError:
        return False

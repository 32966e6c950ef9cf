"""What the operating system does to the gateway: it is stopped and goes on, and it runs out of descriptors."""

import asyncio
import os
import resource
import signal
from pathlib import Path

import pytest
from aiohttp import web

from tests.server.fakes.gateway import start_gateway
from tests.server.fakes.requests import chat, image_file, image_part
from tests.server.fakes.stack import start_stack
from tests.server.fakes.vllm import default_response
from tests.server.fakes.waiting import wait_until

IMPATIENT = "import server.processes as p; p._ANSWER_SECONDS = 20; from server.__main__ import main; main()"
STOPPED_SECONDS = 21.0
"""More than the time to answer, which must be long enough for a process to start."""


async def test_processes_that_were_all_stopped_go_on_and_none_is_replaced(tmp_path: Path) -> None:
    """As in a virtual machine that is paused. A parent that then looked at its clock first would kill its children."""
    async with (
        start_stack(tmp_path) as stack,
        start_gateway(stack, "--workers=2", program=("-c", IMPATIENT)) as gateway,
    ):
        await wait_until(lambda: len(gateway.serving_pids()) == 2, "both processes run")
        may_respond = asyncio.Event()

        async def respond(request: web.Request) -> web.StreamResponse:
            await may_respond.wait()
            return await default_response(request)

        gateway.engine.respond = respond
        requests = [asyncio.create_task(gateway.post(chat("hello"))) for _ in range(10)]
        await wait_until(lambda: len(gateway.engine.requests) == 10, "all requests are being served")
        pids = gateway.serving_pids()
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in (gateway.process.pid, *pids):
                os.kill(pid, number)
            if number == signal.SIGSTOP:
                await asyncio.sleep(STOPPED_SECONDS)
        may_respond.set()
        assert {(await request).status for request in requests} == {200}
        await asyncio.sleep(1.0)
        assert gateway.serving_pids() == pids


@pytest.mark.parametrize("free", [0, 8])
async def test_a_gateway_without_descriptors_serves_again_once_there_are_some(tmp_path: Path, free: int) -> None:
    async with start_stack(tmp_path) as stack, start_gateway(stack) as gateway:
        assert (await gateway.chat(image_part(image_file(0)))).status == 200
        pid = gateway.process.pid
        used = len(os.listdir(f"/proc/{pid}/fd"))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + free, used + free + 100))
        idle = [await asyncio.open_connection("127.0.0.1", gateway.port) for _ in range(40)]
        await asyncio.sleep(2.0)  # several probes
        for _, writer in idle:
            writer.close()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 100, used + 100))
        await gateway.wait_until_ready()
        assert (await gateway.chat(image_part(image_file(1)))).status == 200
        await gateway.wait_until_idle()
        assert gateway.process.returncode is None

"""`dvd drain`: a real gateway is drained by the real command."""

import asyncio
import sys
from pathlib import Path

import pytest
from aiohttp import web

from tests.ports import free_port
from tests.server.fakes.gateway import is_refused, start_gateway
from tests.server.fakes.handlers import hang
from tests.server.fakes.requests import chat
from tests.server.fakes.stack import start_stack
from tests.server.fakes.waiting import wait_until


async def run_drain(*arguments: str) -> tuple[int | None, str, str]:
    """Run the command. Returns its exit status, its output, and its errors."""
    command = [sys.executable, "-c", "from dvd.cli import main; main()", "drain", *arguments]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_gateway_drains_and_ends(tmp_path: Path, workers: int) -> None:
    address = f"unix:{tmp_path}/admin" if workers == 1 else f"127.0.0.1:{free_port()}"
    flags = (f"--workers={workers}", f"--admin={address}", "--shutdown-delay=0", "--shutdown-grace=600")
    async with start_stack(tmp_path) as stack, start_gateway(stack, *flags) as gateway:
        may_end = asyncio.Event()
        respond = stack.engine.respond

        async def wait_then_respond(request: web.Request) -> web.StreamResponse:
            await may_end.wait()
            return await respond(request)

        stack.engine.respond = wait_then_respond
        running = asyncio.create_task(gateway.post(chat("hello")))
        await wait_until(lambda: stack.engine.requests, "the engine has the request")
        for path in ("/admin/drain", "/admin/status"):
            assert (await gateway.get(path)).status == 404, "the public port has no such path"
        waiting = asyncio.create_task(run_drain(address, "--wait=600"))
        await wait_until(lambda: is_refused(gateway), "the gateway drains")
        assert await run_drain(address) == (0, f"{address}: draining\n", "")
        expected = f"dvd drain: {address}: still draining after 0.2 s; its --shutdown-grace may be longer than --wait\n"
        assert await run_drain(address, "--wait=0.2") == (1, "", expected)
        assert not running.done()
        may_end.set()
        assert (await running).status == 200
        status, line, error = await waiting
        assert (status, error) == (0, "")
        assert line.startswith(f"{address}: ended after ")
        assert line.count("\n") == 1
        assert (await gateway.wait_until_ended())[0] == 0


async def test_a_replacement_that_serves_counts_as_the_end(tmp_path: Path) -> None:
    """A supervisor may start the next process before the command looks again."""
    address = f"unix:{tmp_path}/admin"
    flags = (f"--admin={address}", "--shutdown-delay=0", "--shutdown-grace=600")
    async with start_stack(tmp_path) as stack:
        async with start_gateway(stack, *flags) as gateway:
            stack.engine.respond = hang
            running = asyncio.create_task(gateway.post(chat("hello")))
            await wait_until(lambda: stack.engine.requests, "the engine has the request")
            waiting = asyncio.create_task(run_drain(address, "--wait=600"))
            await wait_until(lambda: is_refused(gateway), "the gateway drains")
            gateway.process.kill()
            await asyncio.gather(running, return_exceptions=True)
        async with start_gateway(stack, *flags):
            assert (await waiting)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["127.0.0.1:1"], 1, "dvd drain: 127.0.0.1:1: no admin listener answers ([Errno 111] Connection refused): start the process with --admin 127.0.0.1:1\n"),  # noqa: E501
        (["unix:/nowhere/admin"], 1, "dvd drain: unix:/nowhere/admin: no admin listener answers ([Errno 2] No such file or directory): start"),  # noqa: E501
        (["gateway"], 2, "dvd drain: ADDRESS = 'gateway': expected HOST:PORT"),
        ([], 2, "dvd drain: missing ADDRESS: the process' --admin"),
        (["127.0.0.1:1", "--wait=0"], 2, "dvd drain: --wait = '0': expected more than 0"),
    ],
)  # fmt: skip
async def test_a_failure_is_one_line_and_an_exit_status(arguments: list[str], status: int, message: str) -> None:
    ended, out, err = await run_drain(*arguments)
    assert (ended, out) == (status, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


async def test_the_public_port_is_no_admin_listener(tmp_path: Path) -> None:
    async with start_stack(tmp_path) as stack:
        status, out, error = await run_drain(f"127.0.0.1:{stack.port}")
        assert (status, out) == (1, "")
        assert "this is no admin listener: POST /admin/drain returned status 404, expected 202" in error


async def test_an_admin_address_that_cannot_be_bound_is_an_error_of_the_gateway(tmp_path: Path) -> None:
    flags = [f"--admin=unix:{tmp_path}/missing/admin", "--port=0", "--vision-workers=a:1", "--language-workers=a:2"]
    command = [sys.executable, "-m", "server", "--log-level=warning", *flags]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    _, error = await process.communicate()
    assert process.returncode == 1
    expected = (
        f"dvd gateway: cannot listen on unix:{tmp_path}/missing/admin: No such file or directory; choose another --admin\n"
    )
    assert error.decode() == expected

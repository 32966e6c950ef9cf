"""A gateway in processes of its own, in front of the fake workers of a stack."""

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from tests.server.fakes.stack import Stack
from tests.server.fakes.waiting import TIMEOUT_SECONDS


class Gateway(Stack):
    """A gateway in processes of its own, in front of the workers of a stack."""

    process: asyncio.subprocess.Process
    _output: asyncio.Task[bytes]

    def serving_pids(self) -> list[int]:
        """Return the ids of the processes that serve requests."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"spawn_main" in _command_line(pid)]

    async def wait_until_ended(self) -> tuple[int, str]:
        """Wait until the process has ended. Returns its exit status and its log."""
        status = await asyncio.wait_for(self.process.wait(), TIMEOUT_SECONDS)
        return status, (await self._output).decode()


def _command_line(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:  # it has ended since it was listed
        return b""


@asynccontextmanager
async def start_gateway(stack: Stack, *flags: str, program: Sequence[str] = ("-m", "server")) -> AsyncIterator[Gateway]:
    """Start `python -m server`, or another program, with these flags, and yield it when it is ready."""
    addresses = {
        "vision-workers": ",".join(worker.address for worker in stack.vision_workers),
        "language-workers": ",".join(worker.sink.address for worker in stack.language_workers),
    }
    command = [*program, "--port=0", *(f"--{name}={value}" for name, value in addresses.items()), *flags]
    process = await asyncio.create_subprocess_exec(sys.executable, *command, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    try:
        match = re.search(rb"listening on http://127.0.0.1:(\d+)", await process.stderr.readline())
        assert match
        output = asyncio.create_task(process.stderr.read())
        # a connection for each request, so that they spread over the processes
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)) as session:
            gateway = Gateway(stack.vision_workers, stack.language_workers, session, int(match[1]))
            gateway.process, gateway._output = process, output
            await gateway.wait_until_ready()
            yield gateway
        output.cancel()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def is_refused(gateway: Gateway) -> bool:
    """Return whether the gateway accepts no new connection."""
    try:
        await gateway.get("/health/live")
    except aiohttp.ClientConnectorError:
        return True
    except aiohttp.ClientError:  # it was in the queue of the socket
        return False
    return False

"""The health checks of the containers, run as the processes they are against the processes that the images start.

The commands are those of docker-compose.yaml and the Dockerfiles, on free ports of this machine. Only vLLM is missing: a
language worker here is its sink, and a server that answers for vLLM.
"""

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from functools import cache
from pathlib import Path

from common import errors
from common.checkpoint import open_checkpoint
from dvd.health import check
from lm_worker.shared_memory import create_folder
from lm_worker.sink import SinkOptions
from tests.deploy.files import ROOT, dockerfile, environment, services
from tests.ports import free_port
from tests.server.fakes.vllm import FakeVLLM
from tests.server.fakes.waiting import wait_until

EXPOSED = [str(port) for service in ("gateway", "vision", "language") for port in dockerfile(service).ports()]
CHECKPOINT = ROOT / "demo/checkpoint"
VARIABLES = {"VISION_FLAGS": "--vision-backend=fake --device=cpu --cache=none"}
"""The last flag wins: no tower, and no redis."""


@cache
def free(port: str) -> str:
    """The port of this machine that stands for one of a container."""
    return str(free_port()) if port in EXPOSED else port


PATIENCE = 200.0
"""Seconds until a process counts as one that never starts: only a failing test needs them."""


def moved(text: str) -> str:
    """What a file says, on this machine: ports that are free, this host for every name, the bundled checkpoint."""
    text = re.sub(r"\b(\d+)\b", lambda found: free(found[1]), text)
    text = re.sub(r"dns:\w+", "dns:localhost", text).replace("0.0.0.0", "127.0.0.1")
    return text.replace("/models/checkpoint", str(CHECKPOINT))


def program(words: list[str]) -> list[str]:
    """`dvd`, by this Python and of this folder."""
    assert words[0] == "dvd"
    return [sys.executable, "-c", "from dvd.cli import main; main()", *map(moved, words[1:])]


@contextlib.asynccontextmanager
async def container(service: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """The process of a service, without tini: its entrypoint, command and variables. It ends by SIGTERM."""
    said = services(**VARIABLES)[service]
    words = program([*dockerfile(service).entrypoint()[2:], *said["command"]])
    ours = {name: moved(value) for name, value in environment(service, said).items()}
    process = await asyncio.create_subprocess_exec(*words, cwd=ROOT, env={**outside(), **ours})
    try:
        yield process
        assert process.returncode is None, f"{service} has ended"
        process.terminate()
        assert await process.wait() in (0, -signal.SIGTERM), "uvicorn ends by the signal that ended it"
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def outside() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("DVD_")}


@contextlib.asynccontextmanager
async def language_worker(folder: Path) -> AsyncIterator[FakeVLLM]:
    """Its sink as a process, where the image says, and vLLM's place taken."""
    ours = {name: moved(value) for name, value in environment("language", services()["language"]).items()}
    said = open_checkpoint(CHECKPOINT)
    options = SinkOptions(
        model=str(said.path), listen=ours["DVD_LISTEN"], http=ours["DVD_HTTP"].replace("127.0.0.1", "0.0.0.0"),
        dtype="float32", folder=str(folder / "sink"), budget=1 << 20, lease=60,
        metrics_port=int(ours["DVD_METRICS_PORT"]),
    )  # fmt: skip
    create_folder(folder / "sink")
    engine = FakeVLLM(ours["DVD_HTTP"])
    await engine.start()
    process = await asyncio.create_subprocess_exec(
        sys.executable, *options.arguments(), cwd=ROOT, env=outside(), stdin=asyncio.subprocess.PIPE
    )
    try:
        yield engine
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()
        await engine.stop()


async def health(service: str) -> tuple[int | None, str]:
    """Status and words of the check that Compose runs in the container."""
    kind, *command = services()[service]["healthcheck"]["test"]
    assert kind == "CMD"
    process = await asyncio.create_subprocess_exec(
        *program(command), cwd=ROOT, env=outside(), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await process.communicate()
    return process.returncode, said.decode()


def asked(service: str) -> str:
    """The address that the check names."""
    return moved(services()[service]["healthcheck"]["test"][-1])


async def well(address: str) -> bool:
    with contextlib.suppress(errors.DvdError):
        return bool(await check(address, 5))
    return False


async def becomes_healthy(service: str) -> None:
    """Waited for here, where a question costs no start of a Python, and then asked as Compose asks."""
    await wait_until(lambda: well(asked(service)), f"{service} is well", PATIENCE)
    status, said = await health(service)
    assert status == 0, said
    assert said.startswith(f"{asked(service)}: ")


async def test_each_check_says_what_is_so(tmp_path: Path) -> None:
    """From nothing to all of it and back. The gateway finds both kinds of worker by name, as Compose's command says."""
    for status, said in await asyncio.gather(*map(health, ("gateway", "vision", "language"))):
        assert status == 1
        assert said.startswith("dvd health: ")
    ready = asked("gateway").replace("/live", "/ready")
    async with container("gateway"):
        await becomes_healthy("gateway")
        assert not await well(ready), "it lives without any worker, and says so"
        async with container("vision"), language_worker(tmp_path) as engine:
            await becomes_healthy("vision")
            await becomes_healthy("language")
            await wait_until(lambda: well(ready), "the gateway has found both", PATIENCE)
            await engine.stop()
            status, said = await health("language")
            assert status == 1, "a sink without its vLLM is no language worker"
            assert "does not answer" in said
            assert await well(asked("gateway"))
        assert not await well(asked("vision"))

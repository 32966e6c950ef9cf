"""The containers' health checks, run against the processes that the images start.

The commands are those of docker-compose.yaml and the Dockerfiles, on free ports of this machine. Only vLLM is replaced: the
language worker is its sink and a server that stands for vLLM.
"""

import asyncio
import contextlib
import os
import re
import sys
from collections.abc import AsyncIterator
from functools import cache
from pathlib import Path
from typing import Any

from common import errors
from common.checkpoint import open_checkpoint
from dvd.health import check
from lm_worker.shared_memory import create_folder
from lm_worker.sink import SinkOptions
from tests.deploy.files import ROOT, dockerfile, dvd_environment, services
from tests.ports import free_port
from tests.server.fakes.vllm import FakeVLLM
from tests.server.fakes.waiting import wait_until

EXPOSED_PORTS = [str(port) for service in ("gateway", "vision", "language") for port in dockerfile(service).ports()]
CHECKPOINT = ROOT / "demo/checkpoint"
START_TIMEOUT_SECONDS = 200.0
"""How long a process may take to start; only a failing test needs it."""


def service_config(service: str) -> Any:
    """Return a service; the vision worker needs neither a tower nor redis, since the last of repeated flags counts."""
    return services(VISION_FLAGS="--vision-backend=fake --device=cpu --cache=none")[service]


@cache
def local_port(port: str) -> str:
    """Return the port of this machine that stands for a container's port."""
    return str(free_port()) if port in EXPOSED_PORTS else port


def localized(text: str) -> str:
    """Replace container ports, host names and the model's path by those of this machine."""
    text = re.sub(r"\b(\d+)\b", lambda match: local_port(match[1]), text)
    text = re.sub(r"dns:\w+", "dns:localhost", text).replace("0.0.0.0", "127.0.0.1")
    return text.replace("/models/checkpoint", str(CHECKPOINT))


def dvd_command(words: list[str]) -> list[str]:
    """Return a `dvd` command for this Python and this folder."""
    assert words[0] == "dvd"
    return [sys.executable, "-c", "from dvd.cli import main; main()", *map(localized, words[1:])]


@contextlib.asynccontextmanager
async def run_service(service: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run the process of a service without tini: its entrypoint, command and variables. SIGTERM ends it."""
    config = service_config(service)
    command = dvd_command([*dockerfile(service).entrypoint()[2:], *config["command"]])
    variables = {name: localized(value) for name, value in dvd_environment(service, config).items()}
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env={**clean_environment(), **variables})
    try:
        yield process
        assert process.returncode is None, f"{service} has exited"
        process.terminate()
        assert await process.wait() == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("DVD_")}


@contextlib.asynccontextmanager
async def run_language_worker(folder: Path) -> AsyncIterator[FakeVLLM]:
    """Run a sink at the image's address, and a stand-in for vLLM."""
    variables = {name: localized(value) for name, value in dvd_environment("language", services()["language"]).items()}
    options = SinkOptions(
        model=str(open_checkpoint(CHECKPOINT).path), listen=variables["DVD_LISTEN"],
        http=variables["DVD_HTTP"].replace("127.0.0.1", "0.0.0.0"),
        dtype="float32", folder=str(folder / "sink"), budget=1 << 20, lease=60,
        metrics_port=int(variables["DVD_METRICS_PORT"]),
    )  # fmt: skip
    create_folder(folder / "sink")
    engine = FakeVLLM(variables["DVD_HTTP"])
    await engine.start()
    process = await asyncio.create_subprocess_exec(
        sys.executable, *options.arguments(), cwd=ROOT, env=clean_environment(), stdin=asyncio.subprocess.PIPE
    )
    try:
        yield engine
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()
        await engine.stop()


async def run_health_check(service: str) -> tuple[int | None, str]:
    """Return exit status and output of the check that Compose runs in the container."""
    kind, *command = services()[service]["healthcheck"]["test"]
    assert kind == "CMD"
    process = await asyncio.create_subprocess_exec(
        *dvd_command(command),
        cwd=ROOT,
        env=clean_environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return process.returncode, output.decode()


def checked_address(service: str) -> str:
    """Return the address in the service's health check."""
    return localized(services()[service]["healthcheck"]["test"][-1])


async def is_healthy(address: str) -> bool:
    with contextlib.suppress(errors.DvdError):
        return bool(await check(address, 5))
    return False


async def becomes_healthy(service: str) -> None:
    """Wait in this process, where a check needs no new Python, and then check as Compose does."""
    await wait_until(lambda: is_healthy(checked_address(service)), f"{service} is healthy", START_TIMEOUT_SECONDS)
    status, output = await run_health_check(service)
    assert status == 0, output
    assert output.startswith(f"{checked_address(service)}: ")


async def test_health_checks_follow_the_state_of_the_processes(tmp_path: Path) -> None:
    """From no process to all of them and back. The gateway finds workers by name, as in Compose."""
    for status, output in await asyncio.gather(*map(run_health_check, ("gateway", "vision", "language"))):
        assert status == 1
        assert output.startswith("dvd health: ")
    readiness = checked_address("gateway").replace("/live", "/ready")
    async with run_service("gateway"):
        await becomes_healthy("gateway")
        assert not await is_healthy(readiness), "without a worker the gateway is alive, but not ready"
        async with run_service("vision"), run_language_worker(tmp_path) as engine:
            await becomes_healthy("vision")
            await becomes_healthy("language")
            await wait_until(lambda: is_healthy(readiness), "the gateway has found both workers", START_TIMEOUT_SECONDS)
            await engine.stop()
            status, output = await run_health_check("language")
            assert status == 1, "a sink without its vLLM is no language worker"
            assert "does not answer" in output
            assert await is_healthy(checked_address("gateway"))
        assert not await is_healthy(checked_address("vision"))

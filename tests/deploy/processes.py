"""All processes with only vLLM replaced (gateway, vision worker, sink), and a Prometheus that scrapes them."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from lm_worker.shared_memory import create_folder
from lm_worker.sink import SinkOptions
from tests.deploy.promql import ROOT, RULES
from tests.ports import free_port
from tests.server.fakes.handlers import event_stream
from tests.server.fakes.vllm import FakeVLLM

CHECKPOINT = ROOT / "tests/data/golden/flash-qwen3/checkpoint"
TIMEOUT_SECONDS = 240.0
"""How long a test waits for a condition; only a failing test, or a busy machine, needs it."""

WORDS = [f'data: {{"choices":[{{"index":0,"delta":{{"content":"{word}"}}}}]}}\n\n'.encode() for word in ("one", "two", "three")]
ENGINE_EVENTS = [b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n', *WORDS, b"data: [DONE]\n\n"]


async def wait_until(condition: Callable[[], Awaitable[Any]], explain: Callable[[], str]) -> Any:
    """Return the first true result of `condition`; `explain` supplies the message of a failure."""
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while not (result := await condition()):
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(f"condition not met after {TIMEOUT_SECONDS} s: {explain()}") from None
    return result


@dataclass
class Processes:
    """The running processes. `ports` has the metrics port of each."""

    folder: Path
    session: aiohttp.ClientSession
    ports: dict[str, int]
    engine: FakeVLLM

    @property
    def url(self) -> str:
        """URL of the gateway."""
        return f"http://127.0.0.1:{self.ports['gateway']}"

    async def get(self, url: str, **parameters: Any) -> tuple[int, bytes]:
        """Return status and body, with status 0 if nothing responds."""
        try:
            async with self.session.get(url, params=parameters) as response:
                return response.status, await response.read()
        except aiohttp.ClientError:
            return 0, b""

    def log(self, name: str) -> str:
        """Return everything a process has logged."""
        return (self.folder / f"{name}.log").read_text()

    def records(self, name: str) -> list[dict[str, Any]]:
        """Return a process' log as JSON records."""
        return [json.loads(line) for line in self.log(name).splitlines()]


@contextlib.asynccontextmanager
async def run_processes(folder: Path) -> AsyncIterator[Processes]:
    """Run everything but Prometheus, and wait until it is ready."""
    create_folder(folder / "store")
    engine = FakeVLLM(f"unix:{folder}/http")
    engine.respond = event_stream(*ENGINE_EVENTS)
    ports = {name: free_port() for name in ("gateway", "vision", "sink")}
    options = SinkOptions(
        model=str(CHECKPOINT), listen=f"unix:{folder}/sink", http=engine.address, dtype="float32", folder=str(folder / "store"),
        budget=64 << 20, lease=60.0, metrics_port=ports["sink"], log_level="debug", log_format="json",
    )  # fmt: skip
    vision = [
        "-m", "vision_worker", str(CHECKPOINT), f"--listen=unix:{folder}/vision", f"--metrics-port={ports['vision']}",
        "--log-format=json", "--max-batch-tiles=4",
    ]  # fmt: skip
    gateway = [
        "-m", "server", f"--port={ports['gateway']}", f"--vision-workers=unix:{folder}/vision",
        f"--language-workers=unix:{folder}/sink", "--log-format=json",
    ]  # fmt: skip
    async with contextlib.AsyncExitStack() as stack:
        await engine.start()
        stack.push_async_callback(engine.stop)
        for name, arguments in (("sink", options.arguments()), ("vision", vision), ("gateway", gateway)):
            await stack.enter_async_context(_process(folder, name, sys.executable, *arguments))
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
        session = await stack.enter_async_context(aiohttp.ClientSession(timeout=timeout))
        processes = Processes(folder, session, ports, engine)

        async def is_ready() -> bool:
            return (await processes.get(f"{processes.url}/health/ready"))[0] == 200

        await wait_until(is_ready, lambda: "".join(processes.log(name) for name in ports))
        yield processes


@contextlib.asynccontextmanager
async def run_prometheus(program: str, processes: Processes) -> AsyncIterator[str]:
    """Run a Prometheus that scrapes all processes every second and evaluates the rules; yields its URL."""
    folder, port = processes.folder, free_port()
    jobs: list[dict[str, Any]] = [
        {"job_name": name, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]} for name, port in processes.ports.items()
    ]
    engine = {"job_name": "engine", "metrics_path": "/metrics/engine/0", "static_configs": jobs[0]["static_configs"]}
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"}, "rule_files": [str(RULES)],
        "scrape_configs": [*jobs, engine],
    }  # fmt: skip
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    flags = [
        f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/tsdb",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    async with _process(folder, "prometheus", program, *flags):

        async def is_ready() -> bool:
            return (await processes.get(f"{url}/-/ready"))[0] == 200

        await wait_until(is_ready, lambda: processes.log("prometheus"))
        yield url


@contextlib.asynccontextmanager
async def _process(folder: Path, name: str, *command: str) -> AsyncIterator[None]:
    """Run a process for the length of the block, with its output in `NAME.log`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DVD_")}
    with (folder / f"{name}.log").open("wb") as log:
        # the sink exits when its standard input is closed, hence the pipe
        process = await asyncio.create_subprocess_exec(
            *command, cwd=ROOT, env=environment, stdin=asyncio.subprocess.PIPE, stdout=log, stderr=log
        )
    try:
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), 30)
        except TimeoutError:
            process.kill()
            await process.wait()

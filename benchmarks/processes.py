"""Servers under measurement: each is pinned to cores, and its process group is ended at the end of the measurement."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from benchmarks.colocated import TORCHVISION_SHIM
from common.processes import die_with_parent
from tests.ports import free_port

_START_TIMEOUT_SECONDS = 300.0
_STOP_TIMEOUT_SECONDS = 20.0

# vLLM's flags on a CPU, the same for both sides. Compilation takes minutes and is not what is measured.
_VLLM_FLAGS = ("--enforce-eager", "--kv-cache-memory-bytes=1073741824", "--max-num-seqs=64", "--max-num-batched-tokens=4096")


@dataclass
class Server:
    """A process and its children; a context manager that waits until the server is ready and ends all of them.

    Attributes:
        name: Name in error messages and of the log file.
        command: Command line.
        cores: Cores that it may run on; it computes with as many threads.
        folder: Folder of the log file.
        ready: Returns whether the server accepts requests.
        environment: Additional environment variables.
        url: Base URL of its HTTP API, if it has one at a TCP port.
    """

    name: str
    command: Sequence[str]
    cores: Sequence[int]
    folder: Path
    ready: Callable[[], bool]
    environment: Mapping[str, str] = field(default_factory=dict)
    url: str = ""
    _process: "subprocess.Popen[bytes] | None" = None

    def __enter__(self) -> "Server":
        """Start the process. Raises `RuntimeError` with the end of its log if it ends or is not ready in 300 s."""

        def in_child() -> None:
            die_with_parent()
            os.sched_setaffinity(0, self.cores)

        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, preexec_fn=in_child,
                env={**os.environ, "OMP_NUM_THREADS": str(len(self.cores)), **self.environment},
            )  # fmt: skip
        started_at = time.monotonic()
        while not self.ready():
            if self._process.poll() is not None or time.monotonic() - started_at > _START_TIMEOUT_SECONDS:
                self.__exit__(None, None, None)
                raise RuntimeError(f"{self.name} did not start; end of its log: {self.log.read_text(errors='replace')[-1500:]}")
            time.sleep(0.2)
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        """End the process group: SIGTERM, and SIGKILL after 20 s."""
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_TIMEOUT_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    @property
    def log(self) -> Path:
        """File of standard output and error."""
        return self.folder / f"{self.name}.log"

    def cpu_seconds(self) -> float:
        """CPU time so far of the process and its children that run."""
        assert self._process is not None
        group, ticks = str(self._process.pid), 0
        for file in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it has ended
                fields = file.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
                ticks += (int(fields[11]) + int(fields[12])) * (fields[2] == group)
        return ticks / os.sysconf("SC_CLK_TCK")


def available_cores() -> list[int]:
    """Numbers of the cores that this process may run on, in ascending order."""
    return sorted(os.sched_getaffinity(0))


def returns_ok(url: str) -> bool:
    """Whether a GET request returns status 200 within 2 s."""
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def vision_worker(
    folder: Path,
    model: Path,
    cores: Sequence[int],
    *flags: str,
    name: str = "vision",
    runner: Sequence[str] = (),
) -> Server:
    """A vision worker that listens at `unix:FOLDER/NAME`. `runner`: modules that run it, the first one as `__main__`."""
    path = folder / name
    command = [sys.executable, "-m", *runner, "vision_worker", str(model), f"--listen=unix:{path}", *flags]
    return Server(name, command, cores, folder, lambda: _accepts_connections(path))


def language_worker(folder: Path, model: Path, cores: Sequence[int], *vllm_flags: str) -> Server:
    """A language worker: its sink at `unix:FOLDER/language`, vLLM's HTTP server at `unix:FOLDER/language-http`."""
    http = folder / "language-http"
    command = ["-m", "lm_worker", *_language_arguments(folder, model, f"unix:{http}", (), vllm_flags)]
    return _language_server(folder, command, cores, lambda: _accepts_connections(http))


def fake_language_worker(
    folder: Path, model: Path, cores: Sequence[int], port: int, dtype: str, seconds_per_token: float = 0.0,
    worker_flags: Sequence[str] = (), environment: Mapping[str, str] | None = None,
) -> Server:  # fmt: skip
    """A language worker whose engine emits tokens at a fixed pace, with vLLM's HTTP server at `127.0.0.1:PORT`."""
    arguments = _language_arguments(folder, model, f"127.0.0.1:{port}", worker_flags, [f"--dtype={dtype}"])
    command = ["-m", "benchmarks.fake_engine", str(seconds_per_token), *arguments]
    server = _language_server(folder, command, cores, lambda: returns_ok(f"http://127.0.0.1:{port}/health"))
    server.environment = {**server.environment, **(environment or {})}
    return server


@contextmanager
def image_bound_workers(folder: Path, model: Path, cores: Sequence[int], runner: Sequence[str] = ()) -> Iterator[None]:
    """Workers for which images are the bottleneck: the vision worker has no cache, the engine emits 200 tokens a second.

    Each has a core. `runner`: see `vision_worker`.
    """
    with (
        vision_worker(folder, model, cores[:1], "--cache=none", runner=runner),
        fake_language_worker(folder, model, cores[-1:], free_port(), "float32", 0.005),
    ):
        yield


def _language_arguments(
    folder: Path, model: Path, http: str, worker_flags: Sequence[str], vllm_flags: Sequence[str]
) -> list[str]:
    return [
        str(model),
        f"--listen=unix:{folder / 'language'}",
        f"--http={http}",
        *worker_flags,
        "--",
        *_VLLM_FLAGS,
        *vllm_flags,
    ]


def _language_server(folder: Path, arguments: Sequence[str], cores: Sequence[int], ready: Callable[[], bool]) -> Server:
    return Server("language", [sys.executable, *arguments], cores, folder, ready, _vllm_environment(cores))


def _vllm_environment(cores: Sequence[int]) -> dict[str, str]:
    return {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)), "VLLM_LOGGING_LEVEL": "WARNING"}


def gateway(
    folder: Path,
    cores: Sequence[int],
    *flags: str,
    vision_names: Sequence[str] = ("vision",),
    runner: Sequence[str] = (),
) -> Server:
    """A gateway in front of the workers of a folder, whose queue is not bounded unless a flag says so."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    addresses = ",".join(f"unix:{folder / name}" for name in vision_names)
    command = [
        sys.executable, "-m", *runner, "server", f"--port={port}", f"--vision-workers={addresses}",
        f"--language-workers=unix:{folder / 'language'}", "--max-queue-seconds=3600", *flags,
    ]  # fmt: skip
    return Server("gateway", command, cores, folder, lambda: returns_ok(f"{url}/health/ready"), url=url)


def stock_vllm(
    folder: Path, python: str, model: Path, cores: Sequence[int], *flags: str, environment: Mapping[str, str] | None = None
) -> Server:
    """Stock vLLM with its own vision tower, run by the interpreter `python`."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port), "--host", "127.0.0.1",
        f"--served-model-name={model.name}", "--trust-remote-code", *_VLLM_FLAGS, *flags,
    ]  # fmt: skip
    own = {**_vllm_environment(cores), "VLLM_PLUGINS": "none", "PYTHONPATH": str(TORCHVISION_SHIM)}
    return Server("colocated", command, cores, folder, lambda: returns_ok(f"{url}/health"), {**own, **(environment or {})}, url)


def _accepts_connections(path: Path) -> bool:
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
        return True
    except OSError:
        return False

"""Servers under measurement, each on cores of its own choosing, ended by their own ids."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from benchmarks.colocated import SITE
from common.processes import die_with_parent

_PATIENCE = 300.0


@dataclass
class Server:
    """One process and what it started. `cores`: it may run on these only, and computes with as many threads."""

    name: str
    command: Sequence[str]
    cores: Sequence[int]
    folder: Path
    ready: Callable[[], bool]
    environment: Mapping[str, str] = field(default_factory=dict)
    _process: "subprocess.Popen[bytes] | None" = None

    def __enter__(self) -> "Server":
        def here() -> None:
            die_with_parent()
            os.sched_setaffinity(0, self.cores)

        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, preexec_fn=here,
                env={**os.environ, "OMP_NUM_THREADS": str(len(self.cores)), **self.environment},
            )  # fmt: skip
        began = time.monotonic()
        while not self.ready():
            if self._process.poll() is not None or time.monotonic() - began > _PATIENCE:
                self.__exit__(None, None, None)
                raise RuntimeError(f"{self.name} is not ready: {self.log.read_text(errors='replace')[-1500:]}")
            time.sleep(0.2)
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"


def cores() -> list[int]:
    """Those that this machine gives us."""
    return sorted(os.sched_getaffinity(0))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    """Whether a GET is answered 200."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


# vLLM's flags on a CPU, the same for both sides: no compilation, whose minutes nobody measures here
VLLM = ("--enforce-eager", "--kv-cache-memory-bytes=1073741824", "--max-num-seqs=64", "--max-num-batched-tokens=4096")


def vision(folder: Path, model: Path, on: Sequence[int], *flags: str, name: str = "vision") -> Server:
    """A vision worker at `unix:FOLDER/NAME`."""
    listen = folder / name
    command = [sys.executable, "-m", "vision_worker", str(model), f"--listen=unix:{listen}", *flags]
    return Server(name, command, on, folder, lambda: _listens(listen))


def language(folder: Path, model: Path, on: Sequence[int], *flags: str, name: str = "language") -> Server:
    """A language worker, its sink at `unix:FOLDER/NAME`, vLLM at `unix:FOLDER/NAME-http`."""
    http = folder / f"{name}-http"
    command = [
        sys.executable, "-m", "lm_worker", str(model), f"--listen=unix:{folder / name}", f"--http=unix:{http}",
        "--", *VLLM, *flags,
    ]  # fmt: skip
    bind = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, on)), "VLLM_LOGGING_LEVEL": "WARNING"}
    return Server(name, command, on, folder, lambda: _listens(http), bind)


def gateway(folder: Path, on: Sequence[int], *flags: str, visions: int = 1) -> tuple[Server, str]:
    """The gateway in front of workers of a folder, and its URL."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    addresses = ",".join(f"unix:{folder / ('vision' if i == 0 else f'vision-{i}')}" for i in range(visions))
    command = [
        sys.executable, "-m", "server", f"--port={port}", f"--vision-workers={addresses}",
        f"--language-workers=unix:{folder / 'language'}", *flags,
    ]  # fmt: skip
    return Server("gateway", command, on, folder, lambda: answers(f"{url}/health/ready")), url


def colocated(folder: Path, python: str, model: Path, on: Sequence[int], *flags: str) -> tuple[Server, str]:
    """Stock vLLM with its own vision tower, and its URL."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port), "--host", "127.0.0.1",
        f"--served-model-name={model.name}", "--trust-remote-code", *VLLM, *flags,
    ]  # fmt: skip
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, on)), "VLLM_PLUGINS": "none", "VLLM_LOGGING_LEVEL": "WARNING",
        "PYTHONPATH": str(SITE),
    }  # fmt: skip
    return Server("colocated", command, on, folder, lambda: answers(f"{url}/health"), environment), url


def _listens(path: Path) -> bool:
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
        return True
    except OSError:
        return False

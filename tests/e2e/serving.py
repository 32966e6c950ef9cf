"""Starts `dvd` commands for tests. A variable in their environment marks all processes that belong to a command."""

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.ports import free_port

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/data/golden"
IMAGES = GOLDEN / "images"
START_TIMEOUT = 280.0
"""Seconds until a server must be ready."""
MARK = "SERVED_FOR_TEST"
"""The variable that marks the processes of a command."""

# a small cache and no compilation, since starts take most of the time of these tests
QUICK = ("--enforce-eager", "--kv-cache-memory-bytes=268435456", "--max-num-seqs=32")
EXACT = (*QUICK, "--dtype=float32")
TOOLS = ("--enable-auto-tool-choice", "--tool-call-parser=hermes")

# random weights could continue the white space between two tokens of JSON for ever
COMPACT_TOOL_CALLS = {"VLLM_ENFORCE_STRICT_TOOL_CALLING": "0"}
"""Variables with which vLLM writes a forced tool call as JSON; the parser's own format always allows white space."""

SYSTEM = {
    "internvl2_5": "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、"
    "清华大学及多家合作单位联合开发的多模态大语言模型。",
    "Hermes-2": "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。",
}


def image_part(image: str | bytes) -> dict[str, Any]:
    """Returns a content part with a golden image (its file's name) or with these bytes."""
    data = (IMAGES / image).read_bytes() if isinstance(image, str) else image
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}


def text_part(text: str) -> dict[str, Any]:
    """Returns a content part with this text."""
    return {"type": "text", "text": text}


@dataclass
class Answer:
    """A complete HTTP response."""

    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        """The parsed body."""
        return json.loads(self.text)

    @property
    def error(self) -> dict[str, Any]:
        """The error object of the body."""
        return dict(self.json["error"])


@dataclass
class Served:
    """A running `dvd` command."""

    process: "subprocess.Popen[bytes]"
    url: str
    log: Path
    mark: str = field(default="")

    @property
    def lines(self) -> str:
        """What the command has printed so far."""
        return self.log.read_text(errors="replace")

    def get(self, path: str) -> Answer:
        """Sends a GET request."""
        return request(f"{self.url}{path}")

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        """Sends a POST request with these bytes, or with this value as JSON."""
        return request(f"{self.url}{path}", body if isinstance(body, bytes) else json.dumps(body).encode(), headers)

    def chat(self, *content: dict[str, Any] | str, **parameters: Any) -> Answer:
        """Sends one user message; greedy and 16 tokens unless `parameters` change it."""
        parts = [text_part(part) if isinstance(part, str) else part for part in content]
        defaults = {"messages": [{"role": "user", "content": parts}], "max_tokens": 16, "temperature": 0}
        return self.post("/v1/chat/completions", {**defaults, **parameters})

    def metric(self, name: str) -> float:
        """Returns the sum of a metric over all its labels."""
        lines = self.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


def request(url: str, body: bytes | None = None, headers: dict[str, str] | None = None, timeout: float = 240) -> Answer:
    """Sends a GET request, or a POST request where there is a body; an HTTP error is a response too."""
    outgoing = urllib.request.Request(url, body, {"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(outgoing, timeout=timeout) as answer:
            return Answer(answer.status, _lower(answer.headers), answer.read().decode())
    except urllib.error.HTTPError as error:
        return Answer(error.code, _lower(error.headers), error.read().decode())


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def start(*arguments: str | Path, url: str = "", environment: dict[str, str] | None = None) -> Served:
    """Starts `dvd` with these arguments and does not wait; `stop` ends it."""
    mark = uuid.uuid4().hex
    log = Path(tempfile.mkstemp(prefix="dvd-test-", suffix=".log")[1])
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("dvd")), *map(str, arguments)],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            # SPT_NOENV: vLLM sets process titles, which must not overwrite the mark in /proc/PID/environ
            env={**os.environ, "SPT_NOENV": "1", **(environment or {}), MARK: mark},
        )
    return Served(process, url, log, mark)


def run(*arguments: str | Path, timeout: float = 120, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Runs `dvd` to its end and returns the exit code and what it printed."""
    served = start(*arguments, environment=environment)
    try:
        code = served.process.wait(timeout)
    finally:
        stop(served)
    return code, served.lines


def processes(mark: str) -> Iterator[Path]:
    """Yields `/proc/PID` of every process with this mark; a zombie has none."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                yield entry


def alive(mark: str) -> list[str]:
    """Returns the command lines of the processes with this mark, without zombies."""
    command_lines = []
    for entry in processes(mark):
        with contextlib.suppress(OSError):
            command_lines.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return command_lines


def gone(mark: str, within: float) -> list[str]:
    """Waits up to `within` seconds for the processes with this mark to end; returns those that did not."""
    deadline = time.monotonic() + within
    while (remaining := alive(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return remaining


def pid_of(mark: str, title: str) -> int:
    """Returns the id of the only process with this mark whose command line contains `title`."""
    (pid,) = [int(entry.name) for entry in processes(mark) if title in (entry / "cmdline").read_bytes().decode()]
    return pid


def mapped_shared_memory(mark: str) -> set[Path]:
    """Returns the files in shared memory that processes with this mark have mapped."""
    files = set()
    for entry in processes(mark):
        with contextlib.suppress(OSError):
            files |= {line.split()[5] for line in (entry / "maps").read_text().splitlines() if "/dev/shm/" in line}
    return {Path(file) for file in files}


def stop(served: Served) -> None:
    """Ends a command and all processes that it started."""
    if served.process.poll() is None:
        served.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            served.process.wait(40)
    for entry in processes(served.mark):
        with contextlib.suppress(OSError):
            os.kill(int(entry.name), signal.SIGKILL)
    served.process.wait()


def wait_ready(*servers: Served) -> None:
    """Waits until all servers are ready.

    Raises:
        RuntimeError: A server ended or was not ready in time; the message has the end of its log.
    """
    deadline = time.monotonic() + START_TIMEOUT
    for served in servers:
        while True:
            with contextlib.suppress(OSError):
                if request(f"{served.url}/health/ready", timeout=10).status == 200:
                    break
            if served.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"not ready: {served.lines[-6000:]}")
            time.sleep(0.5)


def start_up(checkpoint: Path, *flags: str, vllm: Sequence[str] = EXACT) -> Served:
    """Starts `dvd up` on a free port and does not wait."""
    port = free_port()
    return start("up", checkpoint, f"--port={port}", *flags, "--", *vllm, url=f"http://127.0.0.1:{port}")


@contextlib.contextmanager
def up(checkpoint: Path, *flags: str, vllm: Sequence[str] = EXACT) -> Iterator[Served]:
    """Runs `dvd up` and yields it when it is ready."""
    served = start_up(checkpoint, *flags, vllm=vllm)
    try:
        wait_ready(served)
        yield served
    finally:
        stop(served)

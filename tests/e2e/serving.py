"""Starting the real thing for tests: processes over sockets, found again by a mark in their environment."""

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
MARK = "SERVED_FOR_TEST"

# a small cache and no compilation: starts are what a test suite pays for
QUICK = ("--enforce-eager", "--kv-cache-memory-bytes=268435456", "--max-num-seqs=32")
EXACT = (*QUICK, "--dtype=float32")
TOOLS = ("--enable-auto-tool-choice", "--tool-call-parser=hermes")

SYSTEM = {
    "internvl2_5": "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、"
    "清华大学及多家合作单位联合开发的多模态大语言模型。",
    "Hermes-2": "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。",
}


def image_part(image: str | bytes) -> dict[str, Any]:
    """A content part with a golden image, or with any bytes."""
    data = (IMAGES / image).read_bytes() if isinstance(image, str) else image
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def error(self) -> dict[str, Any]:
        return dict(self.json["error"])


@dataclass
class Served:
    """A running `dvd` command. `lines` is what it has printed so far."""

    process: "subprocess.Popen[bytes]"
    url: str
    log: Path
    mark: str = field(default="")

    @property
    def lines(self) -> str:
        return self.log.read_text(errors="replace")

    def get(self, path: str) -> Answer:
        return request(f"{self.url}{path}")

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return request(f"{self.url}{path}", body if isinstance(body, bytes) else json.dumps(body).encode(), headers)

    def chat(self, *content: dict[str, Any] | str, **parameters: Any) -> Answer:
        """One user message, greedy, 16 tokens unless said otherwise."""
        parts = [text_part(part) if isinstance(part, str) else part for part in content]
        defaults = {"messages": [{"role": "user", "content": parts}], "max_tokens": 16, "temperature": 0}
        return self.post("/v1/chat/completions", {**defaults, **parameters})

    def metric(self, name: str) -> float:
        """The sum over all labels of one metric of this process."""
        found = [line for line in self.get("/metrics").text.splitlines() if line.split("{")[0].split(" ")[0] == name]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)


def request(url: str, body: bytes | None = None, headers: dict[str, str] | None = None, timeout: float = 240) -> Answer:
    made = urllib.request.Request(url, body, {"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(made, timeout=timeout) as answer:
            return Answer(answer.status, _lower(answer.headers), answer.read().decode())
    except urllib.error.HTTPError as error:
        return Answer(error.code, _lower(error.headers), error.read().decode())


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def start(*arguments: str | Path, url: str = "", environment: dict[str, str] | None = None) -> Served:
    """Start `dvd` with these arguments; it goes on until `stop`."""
    mark = uuid.uuid4().hex
    log = Path(tempfile.mkstemp(prefix="dvd-test-", suffix=".log")[1])
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("dvd")), *map(str, arguments)],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {}), MARK: mark},
        )
    return Served(process, url, log, mark)


def run(*arguments: str | Path, timeout: float = 120, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Run `dvd` to its end: exit code, and what it printed."""
    served = start(*arguments, environment=environment)
    try:
        code = served.process.wait(timeout)
    finally:
        stop(served)
    return code, served.lines


def alive(mark: str) -> list[str]:
    """Command lines of the processes that carry the mark, zombies left out."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def gone(mark: str, within: float) -> list[str]:
    """What is still alive after at most `within` seconds."""
    until = time.monotonic() + within
    while (left := alive(mark)) and time.monotonic() < until:
        time.sleep(0.2)
    return left


def stop(served: Served) -> None:
    """End it and everything it started, by the mark."""
    if served.process.poll() is None:
        served.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            served.process.wait(40)
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"{MARK}={served.mark}".encode() in (entry / "environ").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
    served.process.wait()


def wait_ready(*servers: Served) -> None:
    """Until `/health/ready` of each says yes. Raises with the log of one that does not get there."""
    until = time.monotonic() + START_TIMEOUT
    for served in servers:
        while True:
            with contextlib.suppress(OSError):
                if request(f"{served.url}/health/ready", timeout=10).status == 200:
                    break
            if served.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"not ready: {served.lines[-6000:]}")
            time.sleep(0.5)


def start_up(checkpoint: Path, *flags: str, vllm: Sequence[str] = EXACT) -> Served:
    """`dvd up` on a free port, not yet ready."""
    port = free_port()
    return start("up", checkpoint, f"--port={port}", *flags, "--", *vllm, url=f"http://127.0.0.1:{port}")


@contextlib.contextmanager
def up(checkpoint: Path, *flags: str, vllm: Sequence[str] = EXACT) -> Iterator[Served]:
    served = start_up(checkpoint, *flags, vllm=vllm)
    try:
        wait_ready(served)
        yield served
    finally:
        stop(served)

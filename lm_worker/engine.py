"""vLLM's engine, started without importing vLLM more often than needed."""

import asyncio
import contextlib
import functools
import os
import signal
import socket
import time
from argparse import Namespace
from collections.abc import AsyncIterator
from multiprocessing.process import BaseProcess
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client, build_async_engine_client_from_engine_args
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM

from common.options import ConfigError
from common.processes import die_with_parent
from lm_worker.engine_processes import ProcessTree

_START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
_KILL_SECONDS = 5.0
"""Time that the kernel has to end killed processes."""
_POLL_SECONDS = 0.02


@contextlib.asynccontextmanager
async def start_engine(args: Namespace, listening: socket.socket, *, fork: bool) -> AsyncIterator[AsyncLLM]:
    """Start vLLM's engine and yield its client; the engine ends with the block.

    Args:
        args: vLLM's parsed arguments.
        listening: The socket of vLLM's HTTP server, which a forked engine core must not keep open.
        fork: Fork the engine core from this process, which has imported vLLM already, instead of spawning it.
    """
    if fork:
        os.register_at_fork(after_in_child=functools.partial(_detach_from_parent, listening, os.getpid()))
        starting = build_async_engine_client_from_engine_args(_ForkingEngineArgs.from_cli_args(args))
    else:
        starting = build_async_engine_client(args)
    async with starting as engine:
        if fork:
            os.environ[_START_METHOD] = "spawn"  # for processes that vLLM starts later: its CPU platform requires it
        try:
            yield engine
        finally:
            await _stop(engine)


def core_processes(engine: AsyncLLM) -> list[BaseProcess]:
    """Return the engine cores that are children of this process; none if other machines run them."""
    return list(getattr(engine.engine_core.resources.engine_manager, "processes", ()))


async def _stop(engine: AsyncLLM) -> None:
    """Kill the engine cores, with which their own children end, and wait until their shared memory has been returned.

    vLLM kills them too, but at the same time the process of `multiprocessing` that returns the memory of killed ones.
    """
    cores = core_processes(engine)
    tree = ProcessTree(process.pid for process in cores if process.pid is not None)
    tree.read(find_descendants=True)
    engine.engine_core.resources.engine_dead = True  # its monitor would report the end of the engine cores as a failure
    if engine.output_handler is not None:
        engine.output_handler.cancel()  # so would this one
    for process in cores:
        process.kill()
    engine.shutdown(timeout=_KILL_SECONDS)
    deadline = time.monotonic() + _KILL_SECONDS
    while tree.read(find_descendants=False) and time.monotonic() < deadline:
        await asyncio.sleep(_POLL_SECONDS)


def may_fork() -> bool:
    """Whether the engine core may be forked: on a CPU, unless the environment chooses the start method.

    On a GPU a forked process could not use CUDA once this process has initialised it.
    """
    return current_platform.is_cpu() and _START_METHOD not in os.environ


def require_device(name: str) -> None:
    """Check that vLLM computes on the device that the operator has named, and not on another one.

    Args:
        name: `auto` for any device, or `cpu`, `cuda`, `cuda:1`, …; the number is not compared.

    Raises:
        ConfigError: vLLM computes on another device.
    """
    found = current_platform.device_type or "none"
    if name != "auto" and name.split(":")[0] != found:
        hint = "is a GPU passed to this process, and its driver new enough?" if name != "cpu" else "is vLLM built for CPUs?"
        raise ConfigError(f"--device = {name!r}: vLLM would compute on {found!r}; {hint}")


class _ForkingEngineArgs(AsyncEngineArgs):
    """Engine arguments that make vLLM fork its engine core. The engine core still spawns its workers."""

    def create_engine_config(self, *args: Any, **kwargs: Any) -> VllmConfig:
        # vLLM's CPU platform chooses "spawn" here, because of the workers: OpenMP reads the binding of its threads
        # from the environment when it is loaded. The engine core computes nothing, so it needs no such start.
        config = super().create_engine_config(*args, **kwargs)
        if config.parallel_config.data_parallel_size == 1:
            os.environ[_START_METHOD] = "fork"
        return config


def _detach_from_parent(listening: socket.socket, parent: int) -> None:
    """In the forked engine core: release the parent's socket and signal handlers, and end with the parent."""
    if os.getppid() == parent:  # not in what the engine core forks
        die_with_parent(signal.SIGKILL, parent)
    os.environ[_START_METHOD] = "spawn"
    listening.close()
    # otherwise a signal to this process would wake the parent's event loop
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # until the engine core installs its own handlers

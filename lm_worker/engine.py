"""vLLM's engine, started without importing vLLM more often than needed."""

import contextlib
import os
import signal
from argparse import Namespace
from collections.abc import AsyncIterator
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client, build_async_engine_client_from_engine_args
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext

_START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


@contextlib.asynccontextmanager
async def start_engine(args: Namespace, *, fork: bool) -> AsyncIterator[EngineClient]:
    """Start vLLM's engine and yield its client; the engine ends with the block.

    Args:
        args: vLLM's parsed arguments.
        fork: Fork the engine core from this process, which has imported vLLM already, instead of spawning it.
    """
    if fork:
        engine_args = _ForkingEngineArgs.from_cli_args(args)
        client = build_async_engine_client_from_engine_args(engine_args, usage_context=UsageContext.OPENAI_API_SERVER)
    else:
        client = build_async_engine_client(args)
    async with client as engine:
        yield engine


def may_fork() -> bool:
    """Whether the engine core may be forked: on a CPU, unless the environment chooses the start method.

    On a GPU a forked process could not use CUDA once this process has initialised it.
    """
    return current_platform.is_cpu() and _START_METHOD not in os.environ


class _ForkingEngineArgs(AsyncEngineArgs):
    """Makes vLLM fork its engine core; the engine core still spawns its workers."""

    def create_engine_config(self, *args: Any, **kwargs: Any) -> VllmConfig:
        # vLLM's CPU platform sets "spawn" while it completes the configuration, for the workers' sake: OpenMP reads the
        # threads' binding from the environment when it is loaded. The engine core computes nothing.
        config = super().create_engine_config(*args, **kwargs)
        os.environ[_START_METHOD] = "fork"
        os.register_at_fork(after_in_child=_prepare_engine_core)
        return config


def _prepare_engine_core() -> None:
    """Undo, in the forked engine core, what belongs to its parent."""
    os.environ[_START_METHOD] = "spawn"
    # the event loop's: a signal to this process would be taken by the parent for one of its own
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # until the engine core installs its own handlers

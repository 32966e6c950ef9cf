"""Runs vLLM's HTTP server, and stops it in order: after its requests, or with an error for those that take too long."""

import asyncio
import logging
import signal
import socket
from argparse import Namespace
from collections.abc import Coroutine
from http import HTTPStatus
from typing import Any

from vllm.entrypoints.launchers.api_server.entry import build_and_serve
from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine.async_llm import AsyncLLM

from lm_worker.drain import Drain
from lm_worker.errors import EngineDiedError
from lm_worker.http_protocol import BoundedProtocol

log = logging.getLogger("dvd.language")

_CLOSE_SECONDS = 5
"""Time for the last bytes of responses, after the engine has nothing more to send."""


async def serve(
    engine: AsyncLLM,
    address: str,
    listening: socket.socket,
    args: Namespace,
    drain: Drain,
    until_ready: Coroutine[Any, Any, None],
) -> None:
    """Serve until the drain is over. From readiness on, the first signal starts the drain and the second cuts it short.

    Args:
        engine: vLLM's engine.
        address: Address of the HTTP server, for vLLM's log.
        listening: Socket of the HTTP server.
        args: vLLM's parsed arguments.
        drain: Decides when to stop.
        until_ready: Returns when the HTTP server answers.

    Raises:
        EngineDiedError: The engine has ended unexpectedly.
    """
    # log_config: uvicorn's records go to our handler
    server = asyncio.create_task(
        build_and_serve(
            engine, address, listening, args, log_config=None, timeout_graceful_shutdown=_CLOSE_SECONDS, http=BoundedProtocol
        )
    )
    server.add_done_callback(_retrieve_error)
    waiting: list[asyncio.Task[Any]] = [asyncio.create_task(until_ready), asyncio.create_task(drain.finished())]
    try:
        await asyncio.wait([server, waiting[0]], return_when=asyncio.FIRST_COMPLETED)
        _handle_signals(drain)  # vLLM has installed its own handlers before it answers
        await asyncio.wait([server, waiting[1]], return_when=asyncio.FIRST_COMPLETED)
        if not server.done():
            if unfinished := waiting[1].result():
                _fail_unfinished_requests(engine, unfinished)
            server.cancel()  # vLLM catches it, and returns how to close its connections
        await (await server)
    finally:
        for task in waiting:
            task.cancel()
    _raise_if_engine_died(engine)


def _retrieve_error(server: "asyncio.Task[Any]") -> None:
    """Prevent a log record about an error that nobody awaits: a signal before readiness raises `SystemExit` in the task."""
    if not server.cancelled():
        server.exception()


def _handle_signals(drain: Drain) -> None:
    def handle(number: signal.Signals) -> None:
        if drain.is_draining:
            drain.cut_short()
        else:
            drain.start(number.name)

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, handle, number)


def _fail_unfinished_requests(engine: AsyncLLM, count: int) -> None:
    """End requests with an error. Without it, vLLM ends their responses as if they were complete."""
    log.warning("%d requests have not ended within the grace period: they get an error", count)
    logging.getLogger("vllm").setLevel(logging.CRITICAL)  # it logs a stack trace for each stream
    message = "The language worker has stopped before the response was complete."
    engine.output_processor.propagate_error(GracefulHTTPError(message, HTTPStatus.SERVICE_UNAVAILABLE))


def _raise_if_engine_died(engine: AsyncLLM) -> None:
    name = getattr(engine.engine_core.resources.engine_manager, "failed_proc_name", None)
    if name is not None:
        raise EngineDiedError(f"vLLM's process {name} has ended unexpectedly; see its last lines above")

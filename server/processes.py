"""The processes of a gateway: one that serves, or several behind one port, with a parent that replaces those that end.

The parent tells its children through a pipe when to drain and when to end, not by signals. Ctrl-C and systemd send a signal to
every process of a group, and one that arrived twice would look like the second one, which ends running requests.
"""

import asyncio
import contextlib
import logging
import multiprocessing
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from uvicorn.config import STARTUP_FAILURE

from common import logs
from common.descriptors import connection_limit
from common.processes import die_with_parent
from common.security import read_credentials
from server.app import create_app
from server.config import GatewayOptions
from server.http.connections import Connections
from server.http.protocol import uvicorn_config
from server.http.server import GracefulServer
from server.metrics import Metrics
from server.shutdown import Shutdown

log = logging.getLogger(__name__)

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_ANSWER_SECONDS = 30
"""Time for a process to answer its parent, which replaces it otherwise: importing takes seconds.

Two halves, since the parent itself may have been stopped or suspended: when it goes on, the time is up before it reads."""
_PING_INTERVAL_SECONDS = 0.5
_RESTART_SECONDS = 0.5
_KILL_SECONDS = 10.0
"""Time after the grace in which a process must have ended."""
_PING = "ping"

_spawn = multiprocessing.get_context("spawn")


def create_server(options: GatewayOptions) -> GracefulServer:
    """Return the HTTP server of a process."""
    shutdown = Shutdown()
    metrics = Metrics()
    connections = Connections(connection_limit(options.max_connections), options.head_timeout, metrics)
    config = uvicorn_config(
        create_app(options, shutdown=shutdown, metrics=metrics),
        0,
        connections,
        options.trusted_proxies,
        timeout_keep_alive=options.keep_alive_timeout,
        **_tls_options(options),
    )
    tls = read_credentials(options).tls
    return GracefulServer(config, connections, shutdown, options.shutdown_delay, options.shutdown_grace, tls)


async def serve(server: GracefulServer, listener: socket.socket) -> None:
    """Serve in this process until a signal. The second one ends running requests."""
    with _signal_handler(lambda: _drain_or_end(server)):
        await server.serve(sockets=[listener])


def _tls_options(options: GatewayOptions) -> dict[str, Any]:
    """Return uvicorn's options of TLS. Callers need no certificate: they have API keys."""
    return {"ssl_certfile": options.tls_cert, "ssl_keyfile": options.tls_key} if options.tls_cert else {}


class GatewayProcesses:
    """The parent of several processes that serve.

    Args:
        options: Options of each process.
        count: Number of processes.
        listener: Their listening socket. It is closed when they drain.
    """

    def __init__(self, options: GatewayOptions, count: int, listener: socket.socket) -> None:
        self._options, self._count, self._listener = options, count, listener
        self._children: list[_Child] = []
        self._has_failed = self.is_draining = False

    def status(self) -> dict[str, Any]:
        """Return what the admin listener answers. Any thread may call it."""
        return {
            "status": "draining" if self.is_draining else "serving",
            "processes": [child.process.pid for child in list(self._children)],
        }

    async def run(self) -> bool:
        """Run until a signal, of which the second one ends running requests. Returns False if a process could not start."""
        with _signal_handler(lambda: _drain_or_end(self)):
            async with asyncio.TaskGroup() as group:
                for _ in range(self._count):
                    group.create_task(self._keep_running())
        return not self._has_failed

    def drain(self) -> None:
        """Let all processes drain. Further calls have no effect."""
        if self.is_draining:
            return
        self.is_draining = True
        self._listener.close()  # else connections would wait here for a process that accepts them
        self._send(GracefulServer.drain.__name__)
        asyncio.get_running_loop().call_later(self._options.shutdown_grace + _KILL_SECONDS, self._kill)

    def end_now(self) -> None:
        """End all processes; their running requests end with an error."""
        self.drain()
        self._send(GracefulServer.end_now.__name__)

    async def _keep_running(self) -> None:
        """Run a process, and another one after each that ends, until the processes drain."""
        while not self.is_draining:
            child = _Child(self._options, self._listener)
            self._children.append(child)
            status = await child.wait()
            self._children.remove(child)
            if status == STARTUP_FAILURE:
                self._has_failed = True
                self.drain()
            elif not self.is_draining:
                log.warning("process %s ended with %s; another one takes its place", child.process.pid, status)
                await asyncio.sleep(_RESTART_SECONDS)

    def _send(self, command: str) -> None:
        for child in self._children:
            child.send(command)

    def _kill(self) -> None:
        for child in self._children:
            log.error("process %s has not ended after its grace; it is killed", child.process.pid)
            child.process.kill()


class _Child:
    """A process that serves, as its parent sees it."""

    def __init__(self, options: GatewayOptions, listener: socket.socket) -> None:
        self._pipe, pipe_of_child = _spawn.Pipe()
        self.process = _spawn.Process(target=_serve_child, args=(options, listener, pipe_of_child))
        resource_tracker.ensure_running()  # else its start, inside that of the first child, would unblock the signals
        # inherited: a signal to a child that is still importing waits until it can drain, and Ctrl-C is for the parent alone
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            self.process.start()  # in the main thread: die_with_parent is about the thread that starts it
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
        pipe_of_child.close()

    def send(self, command: str) -> None:
        """Call this method of the child's server. A child that is starting calls it when it has started."""
        with contextlib.suppress(OSError):  # it has ended
            self._pipe.send(command)

    async def wait(self) -> int | None:
        """Wait until the process has ended, and kill it if it hangs. Returns its exit status."""
        ended, hung = asyncio.ensure_future(_readable(self.process.sentinel)), asyncio.create_task(self._hangs())
        await asyncio.wait((ended, hung), return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            log.error("process %s does not answer; it is killed", self.process.pid)
            self.process.kill()
            await ended
        hung.cancel()
        await asyncio.wait((hung,))
        self._pipe.close()
        self.process.join()
        return self.process.exitcode

    async def _hangs(self) -> None:
        """Return when the process does not answer in time."""
        while True:
            self.send(_PING)
            if not (await self._answers_within(_ANSWER_SECONDS / 2) or await self._answers_within(_ANSWER_SECONDS / 2)):
                return
            try:
                self._pipe.recv()
            except (EOFError, OSError):
                await asyncio.Event().wait()  # it has ended
            await asyncio.sleep(_PING_INTERVAL_SECONDS)

    async def _answers_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await _readable(self._pipe.fileno())
        except TimeoutError:
            return False
        return True


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(descriptor, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(descriptor)


def _serve_child(options: GatewayOptions, listener: socket.socket, pipe: "Connection[Any, Any]") -> None:
    """Serve in a process of several, until its parent tells it to drain. SIGTERM, to this process alone, drains it too."""
    logs.configure(options.log_level, options.log_format)
    die_with_parent()
    server = create_server(options)
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        threading.Thread(target=_obey, args=(pipe, runner.get_loop(), server), daemon=True).start()
        runner.run(_serve_until_drained(server, listener))


async def _serve_until_drained(server: GracefulServer, listener: socket.socket) -> None:
    with _signal_handler(server.drain, (signal.SIGTERM,)):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))
        await server.serve(sockets=[listener])


def _obey(pipe: "Connection[Any, Any]", loop: asyncio.AbstractEventLoop, server: GracefulServer) -> None:
    """Answer the parent's pings, and call the methods of the server that it names."""
    commands = {method.__name__: method for method in (server.drain, server.end_now)}
    with contextlib.suppress(EOFError, OSError, RuntimeError):  # the parent has ended, or the loop is closed
        while True:
            command = pipe.recv()
            if command == _PING:
                pipe.send(_PING)
            else:
                loop.call_soon_threadsafe(commands[command])


def _drain_or_end(serving: GracefulServer | GatewayProcesses) -> None:
    if serving.is_draining:
        serving.end_now()
    else:
        serving.drain()


@contextlib.contextmanager
def _signal_handler(handler: Callable[[], None], signals: tuple[signal.Signals, ...] = _STOP_SIGNALS) -> Iterator[None]:
    """Call `handler` in the event loop at each of these signals. After the block they are ignored, since the process exits."""
    loop = asyncio.get_running_loop()
    for number in signals:
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)

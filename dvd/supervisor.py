"""Starts the processes of `dvd up`, forwards their output, and stops all of them when one ends.

The children always end with this process: an orderly stop sends them SIGTERM, and if this process is killed the kernel kills
them (`die_with_parent`).
"""

import asyncio
import contextlib
import functools
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from common.options import PREFIX, Options
from common.processes import die_with_parent
from dvd.output import print_child_line, print_status
from dvd.up_processes import ProcessSpec

_LAST_LINES_SECONDS = 5.0
"""Time for the last lines after a process has ended: descendants may still have its output open."""

_REAP_INTERVAL_SECONDS = 0.01
_MAX_LINE_BYTES = 1 << 20
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class _Child:
    """A running process.

    Attributes:
        name: Name in the output.
        stop_timeout: Seconds after SIGTERM until it is killed.
        process: The process.
        exited: Task that returns its exit status.
        watcher: Task that forwards its output and returns how it ended.
    """

    name: str
    stop_timeout: float
    process: asyncio.subprocess.Process
    exited: asyncio.Task[int]
    watcher: asyncio.Task[str]

    def terminate(self) -> None:
        """Send SIGTERM, unless the process has ended."""
        if not self.exited.done():
            self.process.terminate()

    async def wait_or_kill(self) -> None:
        """Wait for the end of the process, and kill it if that takes too long."""
        await asyncio.wait([self.exited], timeout=self.stop_timeout)
        if not self.exited.done():
            self.process.kill()


class Supervisor:
    """The running processes of one machine. As an async context manager it starts them on entry and stops them on exit."""

    def __init__(self, specs: Sequence[ProcessSpec], options: Options) -> None:
        self._specs, self._options = specs, options
        self._children: list[_Child] = []
        self._stop_requested = asyncio.Event()

    async def __aenter__(self) -> Self:
        for number in _STOP_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)
        try:
            for spec in self._specs:
                self._children.append(await self._start(spec))
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stop()
        for number in _STOP_SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)

    async def wait(self) -> str | None:
        """Wait until a signal arrives or a process ends. Returns which process ended and how, or None after a signal."""
        signalled = asyncio.create_task(self._stop_requested.wait())
        watchers = [child.watcher for child in self._children]
        try:
            done, _ = await asyncio.wait([signalled, *watchers], return_when=asyncio.FIRST_COMPLETED)
        finally:
            signalled.cancel()
        return next((watcher.result() for watcher in watchers if watcher in done), None)

    async def _start(self, spec: ProcessSpec) -> _Child:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(PREFIX)}
        process = await asyncio.create_subprocess_exec(
            spec.program, *spec.arguments,
            env={**environment, **spec.environment},
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            # a session of its own: Ctrl-C reaches only this process, and descendants can be killed as a process group
            start_new_session=True, preexec_fn=functools.partial(die_with_parent, signal.SIGKILL, os.getpid()),
            limit=_MAX_LINE_BYTES,
        )  # fmt: skip
        print_status(f"{spec.name}: starting", self._options.log_format)
        exited = asyncio.create_task(_exit_status(process))
        watcher = asyncio.create_task(self._watch(spec.name, process, exited))
        return _Child(spec.name, spec.stop_timeout, process, exited, watcher)

    async def _watch(self, name: str, process: asyncio.subprocess.Process, exited: asyncio.Task[int]) -> str:
        """Print the output of a process until it ends. Returns how it ended."""
        printing = asyncio.create_task(self._print_lines(name, process))
        try:
            status = await asyncio.shield(exited)
            await asyncio.wait([printing], timeout=_LAST_LINES_SECONDS)
        finally:
            printing.cancel()
        return f"{name} ended with {status}; see its last lines above"

    async def _print_lines(self, name: str, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            print_child_line(name, line.decode(errors="replace").rstrip(), self._options)

    def _on_signal(self) -> None:
        """Stop in order at the first signal. Pass a further one on: it ends what still runs."""
        if self._stop_requested.is_set():
            for child in self._children:
                child.terminate()
        self._stop_requested.set()

    async def _stop(self) -> None:
        """Send SIGTERM to each process, to the gateway first so that requests in flight end, then kill what is left."""
        self._stop_requested.set()
        for child in reversed(self._children):
            child.terminate()
            if child.name == "gateway":
                await child.wait_or_kill()
        await asyncio.gather(*(child.wait_or_kill() for child in self._children))
        for child in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.process.pid, signal.SIGKILL)


async def _exit_status(process: asyncio.subprocess.Process) -> int:
    """Wait until a process has ended. `process.wait()` also waits for its output, which a descendant may keep open."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    try:
        descriptor = os.pidfd_open(process.pid)
    except OSError:  # it has ended already, or a container's runtime forbids the call
        descriptor = None
    if descriptor is not None:
        loop.add_reader(descriptor, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
    while process.returncode is None:  # asyncio reads the status in a thread of its own
        await asyncio.sleep(_REAP_INTERVAL_SECONDS)
    return process.returncode

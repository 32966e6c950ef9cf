"""Decodes untrusted files in child processes: a call has limits of CPU time, memory and time, and ends when it is abandoned.

A process has no sockets but the one to its parent, no secrets in its environment, and is reused for the next file. One that
exceeds a limit ends, and the next call starts another. docs/decisions/0033-decoder-processes.md explains the choices.
"""

import contextlib
import fcntl
import json
import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any, TypeVar

from common import errors
from common.decoder_child import MAX_MESSAGE_BYTES, OUT_OF_MEMORY, READY
from common.metrics import DecoderMetrics

log = logging.getLogger("dvd.decoders")

ABANDON_SECONDS = 0.2
"""Time that a call may go on after its caller has left: ordinary files are decoded by then, and the process is kept."""

_WALL_FACTOR = 5
"""In so many times its CPU time a call must get `_MIN_CPU_SHARE` of a CPU; else it hangs."""
_MIN_CPU_SHARE = 0.01
"""A call with less makes no progress. With more it goes on, up to its CPU time or its deadline: others compete for the CPU."""

_START_SECONDS = 60.0
"""Time for a process to start: Python and Pillow or FFmpeg are loaded."""

_MAX_CALLS = 1000
"""Calls of one process, after which another one takes its place: whatever it has leaked goes with it."""

_MAX_KEPT_OUTPUT_BYTES = 32 << 20
"""Size up to which a process keeps its output file: fresh pages cost more than Pillow's pixels take to be written."""

Result = dict[str, Any]
"""What a decoder returns, in JSON."""

_VARIABLES = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONDONTWRITEBYTECODE", "PYTHONHOME", "PYTHONPYCACHEPREFIX")
"""Variables that a decoder process inherits. No other one: they may hold secrets."""


T = TypeVar("T")


@dataclass(frozen=True)
class DecoderKind:
    """What is decoded.

    Attributes:
        module: runs in the process, as `python -m MODULE`; see `common/decoder_child.py`.
        noun: names a file in messages: "image".
        invalid: error of files that exceed a limit, or end the process.
    """

    module: str
    noun: str
    invalid: type[errors.InvalidRequest]


class _Ended(Exception):
    """The process ended during a call, for one of `DecoderMetrics.REASONS`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Call:
    """A call that other threads may abandon, before, while or after it runs.

    Attributes:
        is_abandoned: whether one has.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: _DecoderProcess | None = None
        self.is_abandoned = False

    def abandon(self) -> None:
        """End the process that serves the call, unless the call has ended. Any thread may call it."""
        with self._lock:
            self.is_abandoned = True
            if self._process is not None:
                self._process.kill("abandoned")

    def cpu_seconds(self) -> float:
        """Return the CPU time of the process since the call began; 0 while no process serves the call."""
        with self._lock:
            return self._process.cpu_seconds_of_call() if self._process is not None else 0.0

    @contextlib.contextmanager
    def served_by(self, process: "_DecoderProcess") -> Iterator[None]:
        """Bind the call to a process for the duration of the block."""
        with self._lock:
            if self.is_abandoned:
                raise _Ended("abandoned")
            self._process = process
        try:
            yield
        finally:
            with self._lock:
                self._process = None


class DecoderProcesses:
    """As many processes as calls run at a time: `with DecoderProcesses(kind, memory_bytes, metrics) as processes`.

    They are started when they are first needed, by threads that must live as long as this object. On leaving, they end.

    Args:
        kind: what they decode.
        memory_bytes: memory that a process may use for a file.
        metrics: counters and histograms to update.
    """

    def __init__(self, kind: DecoderKind, memory_bytes: int, metrics: DecoderMetrics) -> None:
        self._kind, self._memory_bytes, self._metrics = kind, memory_bytes, metrics
        self._lock = threading.Lock()
        self._idle: list[_DecoderProcess] = []
        self._all: set[_DecoderProcess] = set()
        self._ended_cpu_seconds = 0.0
        self._is_closed = False

    def __enter__(self) -> "DecoderProcesses":
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._is_closed = True
            running, idle = [*self._all], [*self._idle]
        for process in running:
            process.kill("closed")
        for process in idle:  # the others are waited for by the thread of their call
            process.wait()

    @property
    def pids(self) -> list[int]:
        """Ids of the processes."""
        with self._lock:
            return [process.pid for process in self._all]

    def cpu_seconds(self) -> float:
        """Return the CPU time of all processes so far, in seconds, those that have ended included."""
        with self._lock:
            return self._ended_cpu_seconds + sum(process.cpu_seconds() for process in self._all)

    def run(
        self,
        arguments: Mapping[str, Any],
        data: bytes,
        cpu_seconds: float,
        consume: Callable[[Result, memoryview], T],
        call: Call | None = None,
    ) -> T:
        """Decode a file, in the calling thread's time.

        A process that ends for an unknown reason is replaced, and the call is repeated once.

        Args:
            arguments: passed to the decoder.
            data: the file.
            cpu_seconds: limit of CPU time; `_WALL_FACTOR` times as much is the limit of time without progress.
            consume: gets the decoder's result, and what it has written, read-only and valid only meanwhile. A decoder that was
                taken over may change what is read.
            call: lets another thread abandon the call.

        Returns: what `consume` returns.

        Raises:
            InvalidRequest: the kind's error, or one that the decoder raised.
            CancelledError: the call was abandoned, or this object is closed.
        """
        started, call = time.monotonic(), call or Call()
        try:
            try:
                return self._attempt(arguments, data, cpu_seconds, consume, call, fresh=False)
            except _Ended as end:
                # the kernel may have ended it, or earlier files have used its memory up
                if end.reason not in ("crash", "memory"):
                    raise
                return self._attempt(arguments, data, cpu_seconds, consume, call, fresh=True)
        except _Ended as end:
            raise self._error(end.reason, len(data), cpu_seconds) from None
        finally:
            self._metrics.seconds.observe(time.monotonic() - started)

    def start(self) -> None:
        """Start a process in advance, so that the first call does not wait for it."""
        self._put_back(self._take(fresh=False))

    def _attempt(
        self, arguments: Mapping[str, Any], data: bytes, cpu_seconds: float, consume: Callable[[Result, memoryview], T],
        call: Call, *, fresh: bool,
    ) -> T:  # fmt: skip
        process = self._take(fresh)
        reason: str | None = "crash"
        try:
            with call.served_by(process):
                reply = process.call(arguments, data, cpu_seconds)
            if reply.get("error") == OUT_OF_MEMORY:
                raise _Ended("memory")
            reason = process.kill_reason  # the caller may have left when the reply was here already
            if "error" in reply:
                raise self._reported(reply)
            with process.output(reply["written"]) as output:
                return consume(reply["result"], output)
        except _Ended as end:
            reason = end.reason
            raise
        finally:
            if reason is None:
                self._put_back(process)
            else:
                self._discard(process, reason)

    def _take(self, fresh: bool) -> "_DecoderProcess":
        """Return an idle process, or a new one."""
        with self._lock:
            if self._is_closed:
                raise _Ended("closed")
            if self._idle and not fresh:
                return self._idle.pop()
        process = _DecoderProcess(self._kind.module, self._memory_bytes)
        self._metrics.starts.inc()
        with self._lock:
            self._all.add(process)
            is_late = self._is_closed
        if is_late:  # closed while it started: nobody else would end it
            process.kill("closed")
        return process

    def _put_back(self, process: "_DecoderProcess") -> None:
        with self._lock:
            is_kept = process.calls < _MAX_CALLS and not self._is_closed
            if is_kept:
                self._idle.append(process)
        if not is_kept:
            self._discard(process, None)

    def _discard(self, process: "_DecoderProcess", reason: str | None) -> None:
        """End a process; `reason` is None for one that has served its time."""
        seconds = process.cpu_seconds()
        process.kill(reason or "closed")
        process.wait()
        with self._lock:
            self._all.discard(process)
            self._ended_cpu_seconds += seconds
        if reason in DecoderMetrics.REASONS:
            self._metrics.ends.labels(reason).inc()
            log.warning("a decoder process (%s) ended: %s", self._kind.noun, reason)

    def _reported(self, reply: dict[str, Any]) -> errors.InvalidRequest:
        """Return the error that a decoder reported: of its kind, or a subclass that blames the caller."""
        cls = errors.error_class(str(reply["error"]))
        known = cls if cls is not None and issubclass(cls, errors.InvalidRequest) else self._kind.invalid
        return known(str(reply.get("message")))

    def _error(self, reason: str, size: int, cpu_seconds: float) -> BaseException:
        what = f"The {self._kind.noun} ({size} bytes)"
        match reason:
            case "cpu":
                text = f"takes more than {cpu_seconds:.3g} s of CPU time to decode (--decode-timeout)"
            case "time":
                text = f"makes no progress: it was not decoded within {_WALL_FACTOR * cpu_seconds:.3g} s (--decode-timeout)"
            case "memory":
                text = f"needs more than {self._memory_bytes} bytes of memory to decode (--decode-memory)"
            case "crash":
                text = "cannot be decoded: it ends the decoder"
            case _:
                return CancelledError()
        return self._kind.invalid(f"{what} {text}.")


class _DecoderProcess:
    """One process. `call` is for one thread at a time, all other methods for any."""

    def __init__(self, module: str, memory_bytes: int) -> None:
        self._socket, socket_of_child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
        with socket_of_child:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-s", "-m", module, str(os.getpid()), str(memory_bytes)],
                stdin=socket_of_child.fileno(), stdout=subprocess.DEVNULL,
                env={**variables, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "MALLOC_ARENA_MAX": "2"},
            )  # fmt: skip
        self._reason: str | None = None
        self._cpu_seconds_before = 0.0
        self._is_ready = False
        self._output = _open_output()
        self.calls = 0

    @property
    def pid(self) -> int:
        """Process id."""
        return int(self._process.pid)

    @property
    def kill_reason(self) -> str | None:
        """Why `kill` was called; None if it was not."""
        return self._reason

    def call(self, arguments: Mapping[str, Any], data: bytes, cpu_seconds: float) -> dict[str, Any]:
        """Serve a call. Raises: _Ended."""
        self.calls += 1
        self._wait_until_ready()
        self._cpu_seconds_before = self.cpu_seconds()
        message = json.dumps({"arguments": arguments, "cpu_seconds": cpu_seconds}).encode()
        with _memory_file("input") as source:
            _write_all(source, data)
            os.lseek(self._output, 0, os.SEEK_SET)
            try:
                socket.send_fds(self._socket, [message], [source, self._output])
                reply = self._receive(_WALL_FACTOR * cpu_seconds)
            except OSError:  # it has closed the socket: it has ended
                reply = b""
        if not reply:
            raise _Ended(self._why_it_ended())
        parsed: dict[str, Any] = json.loads(reply)
        return parsed

    def _receive(self, window_seconds: float) -> bytes:
        """Wait for a reply as long as the process makes progress. Raises: OSError, _Ended if it makes none in the window."""
        used = 0.0
        self._socket.settimeout(window_seconds)
        while True:
            with contextlib.suppress(TimeoutError):
                return self._socket.recv(MAX_MESSAGE_BYTES)
            before, used = used, self.cpu_seconds_of_call()
            if used - before < _MIN_CPU_SHARE * window_seconds:
                raise _Ended(self._reason or "time")

    def _wait_until_ready(self) -> None:
        """Wait until a new process can serve. Raises: InternalError if it does not start, _Ended."""
        if self._is_ready:
            return
        self._socket.settimeout(_START_SECONDS)
        try:
            self._is_ready = self._socket.recv(MAX_MESSAGE_BYTES) == READY
        except OSError:  # also if it took too long
            self._is_ready = False
        if not self._is_ready and self._reason is None:
            raise errors.InternalError("A decoder process does not start.")
        if not self._is_ready:
            raise _Ended(str(self._reason))

    @contextlib.contextmanager
    def output(self, size: int) -> Iterator[memoryview]:
        """Yield the first bytes of what the last call has written. Raises: ValueError if it has not written as many."""
        if not size:
            yield memoryview(b"")
            return
        # unmapped with its last reference: an array may still refer to it
        yield memoryview(mmap.mmap(self._output, size, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ))
        if os.fstat(self._output).st_size > _MAX_KEPT_OUTPUT_BYTES:
            os.close(self._output)
            self._output = _open_output()

    def kill(self, reason: str) -> None:
        """End the process. The first reason counts."""
        self._reason = self._reason or reason
        self._process.kill()

    def wait(self) -> None:
        """Wait for the end of a killed process."""
        self._process.wait()
        self._socket.close()
        os.close(self._output)

    def cpu_seconds(self) -> float:
        """Return the CPU time of the process so far; 0 when it has ended."""
        with contextlib.suppress(OSError):
            return time.clock_gettime(~self._process.pid << 3 | 2)  # as clock_getcpuclockid(3) computes it
        return 0.0

    def cpu_seconds_of_call(self) -> float:
        """Return the CPU time of the process since the last call began."""
        return self.cpu_seconds() - self._cpu_seconds_before

    def _why_it_ended(self) -> str:
        if self._reason is None:
            self._process.kill()  # it may only have closed the socket
            if self._process.wait() == -signal.SIGPROF:
                return "cpu"
        return self._reason or "crash"


@contextlib.contextmanager
def _memory_file(name: str) -> Iterator[int]:
    """Yield the descriptor of a new file in memory, without a name in any folder."""
    file = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        yield file
    finally:
        os.close(file)


def _write_all(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]
    os.lseek(file, 0, os.SEEK_SET)


def _open_output() -> int:
    """Return the descriptor of a file that cannot shrink: reading what is gone would end the process that reads."""
    file = os.memfd_create("output", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return file

"""Decides whether vLLM's engine makes progress, from what it sends and what its processes do. Knows no vLLM and no clock."""

from collections.abc import Mapping

from lm_worker.engine_processes import ProcessState

SILENCE_SECONDS = 3.0
"""Time without a message, without CPU time and without a wait for a core, after which an engine counts as stalled."""

GPU_SILENCE_SECONDS = 10.0
"""The same while requests run on a GPU: there a process sleeps while the device computes a long step."""

_STOPPED_SECONDS = 2.5
_MAX_GAP_SECONDS = 1.5
"""If two observations are further apart, this process itself was stopped or got no core: the engine may have answered, and the
rest of that time proves nothing."""


class Progress:
    """Progress of an engine. All arguments `now` are seconds of one monotonic clock."""

    def __init__(self, now: float, timeout: float, busy_silence_seconds: float = SILENCE_SECONDS) -> None:
        """Start with an engine that has just answered.

        Args:
            now: The current time.
            timeout: Time without a token after which running requests count as stalled, whatever the processes do; 0: none.
            busy_silence_seconds: Value of `SILENCE_SECONDS` while requests run.
        """
        self._timeout, self._busy_silence = timeout, busy_silence_seconds
        self._processes: Mapping[int, ProcessState] = {}
        self._observed = self._message = self._token = self._active = now
        self._stopped_since: dict[int, float] = {}
        self.is_starved = False
        """Whether `timeout` has passed, and no token has come since. It stays so if the requests give up."""

    def record_message(self, now: float) -> None:
        """Note a message of the engine, which proves that its loop turns."""
        self._message = now

    def record_token(self, now: float) -> None:
        """Note that the engine has generated or prefilled tokens."""
        self._message = self._token = now
        self.is_starved = False

    def is_silent(self, now: float, seconds: float) -> bool:
        """Whether the engine has sent no message for some seconds."""
        return now - self._message >= seconds

    def stall(self, now: float, unfinished: int, processes: Mapping[int, ProcessState]) -> str | None:
        """Return why the engine is stalled, or None. Call it about once a second.

        Args:
            now: The current time.
            unfinished: Number of requests that have not ended.
            processes: State of the engine's processes; none if it is unknown.
        """
        self._leave_out(now - self._observed - _MAX_GAP_SECONDS, now)
        self._observed = now
        self._note_processes(now, processes)
        if not unfinished:
            self._token = now
        if self._timeout and now - self._token >= self._timeout:
            self.is_starved = True
        return self._stopped(now) or self._silence(now, unfinished) or self._starvation(now, unfinished)

    def _leave_out(self, seconds: float, now: float) -> None:
        """Move all times forward by `seconds`, at most to `now`, as if these seconds had not passed. Nothing if negative."""
        if seconds > 0:
            self._message, self._token, self._active = (
                min(now, time + seconds) for time in (self._message, self._token, self._active)
            )
            self._stopped_since = {pid: min(now, since + seconds) for pid, since in self._stopped_since.items()}

    def _note_processes(self, now: float, processes: Mapping[int, ProcessState]) -> None:
        if not processes or processes != self._processes or any(state.is_runnable for state in processes.values()):
            self._active = now
        self._processes = processes
        stopped = [pid for pid, state in processes.items() if state.is_stopped]
        self._stopped_since = {pid: self._stopped_since.get(pid, now) for pid in stopped}

    def _stopped(self, now: float) -> str | None:
        for pid, since in self._stopped_since.items():
            if now - since >= _STOPPED_SECONDS:
                return f"its process {pid} has been stopped for {now - since:.0f} s, by SIGSTOP or a debugger"
        return None

    def _silence(self, now: float, unfinished: int) -> str | None:
        limit = self._busy_silence if unfinished else SILENCE_SECONDS
        if now - max(self._message, self._active) < limit:
            return None
        return f"it has not answered for {now - self._message:.0f} s, and its processes neither use nor wait for a core"

    def _starvation(self, now: float, unfinished: int) -> str | None:
        if not self.is_starved:
            return None
        if not unfinished:
            return "it has generated no token since --progress-timeout passed"
        return f"no token for {now - self._token:.0f} s with {unfinished} requests running (--progress-timeout)"

"""CPU time and state of vLLM's processes, from /proc."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_STOPPED_STATES = ("T", "t")
"""Stopped by a signal, or by a debugger."""
_RUNNABLE_STATE = "R"
"""Computing, or waiting for a core."""
_ENDED_STATES = ("Z", "X")
"""Ended, but its parent has not read its exit status."""


@dataclass(frozen=True)
class ProcessState:
    """What the kernel reports of a process.

    Attributes:
        parent: Process id of its parent.
        is_stopped: Whether SIGSTOP or a debugger has stopped it.
        cpu_ticks: CPU time that it and its ended children have used.
        is_runnable: Whether its main thread computes, or would if a core were free.
    """

    parent: int
    is_stopped: bool
    cpu_ticks: int
    is_runnable: bool = False


class ProcessTree:
    """Some processes and all their descendants."""

    def __init__(self, roots: Iterable[int]) -> None:
        self._roots = tuple(roots)
        self._members: tuple[int, ...] | None = None

    def read(self, *, find_descendants: bool) -> Mapping[int, ProcessState]:
        """Return the state of each process that exists, by its id. May block for some milliseconds.

        Args:
            find_descendants: Look at every process of the machine. Otherwise only those found the last time are read.
        """
        if find_descendants or self._members is None:
            states = dict(_read_states(int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()))
            self._members = tuple(_descendants(self._roots, states))
            return {pid: states[pid] for pid in self._members}
        return dict(_read_states(self._members))


def _read_states(pids: Iterable[int]) -> Iterator[tuple[int, ProcessState]]:
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            state = _parse_stat((_PROC / str(pid) / "stat").read_text())
            if state is not None:
                yield pid, state


def _parse_stat(stat: str) -> ProcessState | None:
    """Return the state of a process, or None if it has ended."""
    # the name in parentheses may contain spaces and parentheses; proc(5) counts its fields from 1, and state is the third
    fields = stat.rpartition(")")[2].split()
    if fields[0] in _ENDED_STATES:
        return None
    ticks = sum(map(int, fields[11:15]))
    return ProcessState(int(fields[1]), fields[0] in _STOPPED_STATES, ticks, fields[0] == _RUNNABLE_STATE)


def _descendants(roots: Iterable[int], states: Mapping[int, ProcessState]) -> Iterator[int]:
    children = dict[int, list[int]]()
    for pid, state in states.items():
        children.setdefault(state.parent, []).append(pid)
    waiting = [pid for pid in roots if pid in states]
    while waiting:
        pid = waiting.pop()
        yield pid
        waiting += children.get(pid, [])

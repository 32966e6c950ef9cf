"""What the processes of the fleet hold: memory, descriptors, threads, and shared memory."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.soak.fleet import Fleet

_SHARED_MEMORY = Path("/dev/shm")
_MIB = 1 << 20


@dataclass(frozen=True)
class Sample:
    """What one process holds at a time (monotonic seconds). `start` counts its starts: a new process begins anew."""

    at: float
    name: str
    start: int
    memory_mib: float
    descriptors: int
    threads: int


def sample(fleet: Fleet, at: float) -> list[Sample]:
    """Return a sample of each running process."""
    samples = []
    for member in fleet.members:
        folder = Path(f"/proc/{member.pid}")
        with suppress(OSError, ValueError, KeyError):
            status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
            memory = int(status["VmRSS"].split()[0]) / 1024
            descriptors = sum(1 for _ in (folder / "fd").iterdir())
            samples.append(Sample(at, member.name, member.starts, memory, descriptors, int(status["Threads"])))
    return samples


def shared_memory_mib() -> float:
    """Return the size of all files in shared memory in MiB."""
    size = 0
    for file in _SHARED_MEMORY.rglob("*"):
        with suppress(OSError):
            size += file.stat().st_blocks * 512
    return size / _MIB


def growth(samples: list[Sample], name: str) -> dict[str, float]:
    """Return how much a process has grown from its warm state to its end, over the time of its longest run.

    Memory is in MiB. The first third of a run is its warm-up.
    """
    own = [s for s in samples if s.name == name]
    runs = [[s for s in own if s.start == start] for start in {s.start for s in own}]
    longest = max(runs, key=len, default=[])
    if len(longest) < 6:
        return {}
    warm, late = longest[len(longest) // 3 : len(longest) // 2 + 1], longest[-max(len(longest) // 6, 1) :]
    return {
        field: max(getattr(s, field) for s in late) - max(getattr(s, field) for s in warm)
        for field in ("memory_mib", "descriptors", "threads")
    }

"""What a process holds, as the system sees it: compared before and after something hostile."""

import os
from dataclasses import dataclass
from pathlib import Path

MEMORY_ALLOWANCE_BYTES = 64 << 20
"""Private memory that a process may keep: allocators do not return all of it, and caches fill up."""


@dataclass(frozen=True)
class ProcessState:
    """What one process holds.

    Attributes:
        memory_bytes: Its private memory.
        descriptors: Number of its open descriptors.
        threads: Number of its threads.
        children: Number of its child processes.
    """

    memory_bytes: int
    descriptors: int
    threads: int
    children: int

    def excess_over(self, base: "ProcessState") -> dict[str, int]:
        """Return what this process holds more than at an earlier time, by name; memory beyond the allowance only."""
        memory = self.memory_bytes - base.memory_bytes
        excess = {
            "memory": memory if memory > MEMORY_ALLOWANCE_BYTES else 0,
            "descriptors": self.descriptors - base.descriptors,
            "threads": self.threads - base.threads,
            "children": self.children - base.children,
        }
        return {name: count for name, count in excess.items() if count > 0}


def read_state(pid: int) -> ProcessState:
    """Return the state of a process. Raises: `OSError` if it has ended."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    return ProcessState(
        memory_bytes=int(status["RssAnon"].split()[0]) << 10,
        descriptors=len(os.listdir(f"/proc/{pid}/fd")),
        threads=int(status["Threads"]),
        children=len(children(pid)),
    )


def children(pid: int) -> list[int]:
    """Return the ids of the child processes of a process, those of all its threads, without zombies."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split() if entry.isdecimal() else []
        except OSError:  # it has ended since
            continue
        if fields and int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(entry))
    return found


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def folder_content(folder: Path) -> dict[str, int]:
    """Return the size of each file in a folder and below it."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}

"""`python -m benchmarks.soak --minutes 30`: mixed load with random faults on a fleet of real processes.

Exits with 1 if a request got a wrong answer, none, or an error that is not a refusal, or if the gateway's memory or descriptors
grow. Writes what happened to `benchmarks/results/soak/soak.json`, as it goes, and a plot.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import result
from benchmarks.soak import faults, plot, resources
from benchmarks.soak.fleet import Fleet
from benchmarks.soak.requests import FAULTS, OUTCOMES, Load, Outcome

SENDERS = 6
_SAMPLE_SECONDS = 5.0
_AFTER_SECONDS = 20.0
"""Time after a fault for which requests are counted as affected by it."""
_OUT = result.FOLDER / "soak" / "soak.json"
_MAX_GROWTH = {"memory_mib": 60.0, "descriptors": 40, "threads": 16}
"""How much the gateway may grow once it is warm."""


class Record:
    """What happened so far."""

    def __init__(self) -> None:
        self.started_at = time.monotonic()
        self.outcomes: list[Outcome] = []
        self.faults: list[tuple[str, float]] = []
        self.samples: list[resources.Sample] = []
        self.shared_memory: list[tuple[float, float]] = []

    def add_fault(self, name: str, at: float) -> None:
        """Record a fault."""
        self.faults.append((name, at))
        print(f"{at - self.started_at:6.0f} s  {name}", file=sys.stderr, flush=True)

    def counts(self) -> dict[str, int]:
        """Return the number of requests by outcome."""
        counted = Counter(outcome.name for outcome in self.outcomes)
        return {name: counted[name] for name in OUTCOMES}

    def write(self, path: Path, problems: list[str]) -> None:
        """Write everything as JSON."""
        figures: dict[str, Any] = {
            "seconds": round(time.monotonic() - self.started_at),
            "requests": self.counts(),
            "faults": dict(Counter(name for name, _ in self.faults)),
            "after faults": after_faults(self.outcomes, self.faults),
            "growth": {name: resources.growth(self.samples, name) for name in sorted({s.name for s in self.samples})},
            "problems": problems,
            "environment": result.environment(),
            "bad": [asdict(outcome) for outcome in self.outcomes if outcome.name in FAULTS][:50],
        }
        path.write_text(json.dumps(figures, indent=1) + "\n")


def after_faults(outcomes: Sequence[Outcome], events: Sequence[tuple[str, float]]) -> dict[str, dict[str, float]]:
    """Return for each kind of fault what happened to the requests that ended in the time after it.

    `longest` is the longest time to a right answer in seconds.
    """
    kinds: dict[str, dict[str, float]] = {}
    for number, (name, at) in enumerate(events):
        following = events[number + 1][1] if number + 1 < len(events) else at + _AFTER_SECONDS
        own = [o for o in outcomes if at <= o.at < min(following, at + _AFTER_SECONDS)]
        nothing = {"times": 0, "longest": 0.0, "refused": 0, "lost": 0}
        kind = kinds.setdefault(name.rpartition("-")[0] or name, nothing)
        kind["times"] += 1
        kind["longest"] = round(max([kind["longest"], *(o.seconds for o in own if o.name == "right")]), 2)
        kind["refused"] += sum(o.name == "refused" for o in own)
        kind["lost"] += sum(o.name in FAULTS for o in own)
    return kinds


async def soak(minutes: float, seed: int, folder: Path, path: Path) -> list[str]:
    """Run the soak. Returns what was wrong, one line each."""
    async with Fleet(folder) as fleet:
        record, seconds = Record(), 60 * minutes
        print(f"all {len(fleet.members)} processes are up; {minutes:g} minutes of load", file=sys.stderr, flush=True)
        load = Load(fleet.url, record.outcomes.append, seed)
        sending = asyncio.create_task(load.run(SENDERS))
        causing = asyncio.create_task(faults.run_faults(fleet, seed, seconds - 60, record.add_fault))
        while time.monotonic() < record.started_at + seconds:
            await asyncio.sleep(_SAMPLE_SECONDS)
            record.samples += resources.sample(fleet, time.monotonic())
            record.shared_memory.append((time.monotonic(), resources.shared_memory_mib()))
            record.write(path, ["it was not run to its end"])
        causing.cancel()
        load.stop()
        await sending
        in_flight = await fleet.samples("dvd_requests_in_flight")
        problems = _problems(record, sum(value for _, value in in_flight))
    problems += [f"the {name} ended with {status}" for name, status in fleet.exit_statuses.items() if status not in (0, None)]
    record.write(path, problems)
    plot.draw(record.outcomes, record.faults, record.samples, record.shared_memory, record.started_at, path.with_suffix(".png"))
    print(json.dumps(record.counts()))
    return problems


def _problems(record: Record, in_flight: float) -> list[str]:
    problems = [f"{count} requests: {name}" for name, count in record.counts().items() if name in FAULTS and count]
    if not record.counts()["right"]:
        problems.append("no request was answered")
    if in_flight:
        problems.append(f"{in_flight:.0f} requests are in flight after the end")
    grown = resources.growth(record.samples, "gateway")
    too_much = (name for name, most in _MAX_GROWTH.items() if grown.get(name, 0) > most)
    return problems + [f"the gateway's {name} grew by {grown[name]:.0f}" for name in too_much]


def main() -> int:
    """Parse the arguments and run. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0, help="seed of requests and faults")
    parser.add_argument("--out", type=Path, default=_OUT, help="JSON file; the plot gets the same name")
    parsed = parser.parse_args()
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dvd-soak-") as folder:
        problems = asyncio.run(soak(parsed.minutes, parsed.seed, Path(folder), parsed.out))
    for problem in problems:
        print(f"soak: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

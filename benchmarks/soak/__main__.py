"""`python -m benchmarks.soak --minutes 30`: mixed load with random faults on a fleet of real processes.

With `--rolling`, every process is restarted instead, one after the other, in each way that an operator has, behind a client
that follows the readiness of two gateways.

Exits with 1 if a request got a wrong answer, none, or an error that is not a refusal, if the gateway's memory or descriptors
grow, or if a process did not end in order. Writes what happened to `benchmarks/results/soak/`, as it goes, and a plot.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import result
from benchmarks.soak import faults, plot, resources, rolling
from benchmarks.soak.balancer import Balancer
from benchmarks.soak.fleet import Fleet
from benchmarks.soak.requests import FAULTS, OUTCOMES, Load, Outcome
from common.arguments import create_results_folder, positive_number

SENDERS = 6
_SAMPLE_SECONDS = 5.0
_AFTER_SECONDS = 20.0
"""Time after a fault for which requests are counted as affected by it."""
_OUT = result.FOLDER / "soak"
_ROLLING_GATEWAYS = (1, 2)
"""Processes of each gateway of a rolling restart."""
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


Disturb = Callable[[Fleet, Record], Awaitable[list[str]]]
"""What happens to the fleet under load, until it returns what was wrong, one line each."""


def random_faults(minutes: float, seed: int) -> Disturb:
    """Return faults at random for a time, the last minute excepted."""

    async def disturb(fleet: Fleet, record: Record) -> list[str]:
        end = time.monotonic() + 60 * minutes
        await faults.run_faults(fleet, seed, 60 * minutes - 60, record.add_fault)
        await asyncio.sleep(max(end - time.monotonic(), 0))
        return []

    return disturb


def rolling_restart(steps: Callable[[Fleet], Sequence[rolling.Step]], pause_seconds: float = _AFTER_SECONDS) -> Disturb:
    """Return a restart of some members, in these ways and with a pause before each."""

    async def disturb(fleet: Fleet, record: Record) -> list[str]:
        return await rolling.restart_all(fleet, steps(fleet), pause_seconds, record.add_fault)

    return disturb


async def soak(disturb: Disturb, gateways: Sequence[int], seed: int, folder: Path, path: Path) -> list[str]:
    """Run the load while the fleet is disturbed.

    Args:
        disturb: What happens to the fleet.
        gateways: Processes of each gateway.
        seed: Seed of the requests.
        folder: Folder of logs and sockets.
        path: JSON file of what happened; the plot gets the same name.

    Returns:
        What was wrong, one line each.
    """
    async with Fleet(folder, gateways) as fleet, Balancer(fleet) as balancer:
        record = Record()
        print(f"all {len(fleet.members)} processes are up", file=sys.stderr, flush=True)
        load = Load(balancer.choose_url, record.outcomes.append, seed)
        sending = asyncio.create_task(load.run(SENDERS))
        disturbing = asyncio.ensure_future(disturb(fleet, record))
        while not disturbing.done():
            await asyncio.wait([disturbing], timeout=_SAMPLE_SECONDS)
            record.samples += resources.sample(fleet, time.monotonic())
            record.shared_memory.append((time.monotonic(), resources.shared_memory_mib()))
            record.write(path, ["it was not run to its end"])
        load.stop()
        await sending
        in_flight = [value for gateway in fleet.gateways for _, value in await fleet.samples("dvd_requests_in_flight", gateway)]
        problems = [*disturbing.result(), *_problems(record, sum(in_flight))]
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
    grown = resources.growth(record.samples, "gateway-0")
    too_much = (name for name, most in _MAX_GROWTH.items() if grown.get(name, 0) > most)
    return problems + [f"the gateway's {name} grew by {grown[name]:.0f}" for name in too_much]


def main() -> int:
    """Parse the arguments and run. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=positive_number, default=30.0, help="time of random faults")
    parser.add_argument("--seed", type=int, default=0, help="seed of requests and faults")
    parser.add_argument(
        "--rolling", nargs="*", choices=rolling.WAYS, help="restart everything in these ways, by default in all of them"
    )
    parser.add_argument("--out", type=Path, help="JSON file; the plot gets the same name")
    parsed = parser.parse_args()
    is_rolling = parsed.rolling is not None
    path: Path = parsed.out or _OUT / ("rolling.json" if is_rolling else "soak.json")
    create_results_folder(parser, "--out", path.parent)
    disturb = (
        rolling_restart(lambda fleet: rolling.plan(fleet, parsed.rolling or list(rolling.WAYS)))
        if is_rolling
        else random_faults(parsed.minutes, parsed.seed)
    )
    gateways = _ROLLING_GATEWAYS if is_rolling else (1,)
    with tempfile.TemporaryDirectory(prefix="dvd-soak-") as folder:
        problems = asyncio.run(soak(disturb, gateways, parsed.seed, Path(folder), path))
    for problem in problems:
        print(f"soak: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""`make fuzz`: the properties of this folder with random seeds until the time is over, or one fails.

A round runs every property by Hypothesis, and then gives one of them to libFuzzer (atheris), which looks for inputs that reach
new lines. What fails is printed with its seed, and kept in .hypothesis/: the next run begins with it.
"""

import argparse
import itertools
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from tests.fuzz.coverage_guided import properties

ROOT = Path(__file__).parents[2]
_GUIDED_SECONDS = 20


def run_hypothesis(seed: int, seconds: float) -> int | None:
    """Run every property once with this seed. Returns pytest's status, None where the time was over first."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--hypothesis-seed={seed}", "tests/fuzz"]
    environment = {**os.environ, "HYPOTHESIS_PROFILE": "fuzz"}
    try:
        result = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    if result.returncode:
        print(result.stdout[-20000:], result.stderr[-5000:], sep="\n")
        print(f"replay: HYPOTHESIS_PROFILE=fuzz {' '.join(command)}", flush=True)
    return result.returncode


def run_guided(name: str, seed: int, seconds: float) -> int | None:
    """Run one property by libFuzzer. Returns its status, None where atheris is not installed."""
    command = [sys.executable, "-m", "tests.fuzz.coverage_guided", name, str(int(seconds)), str(seed)]
    try:
        import atheris  # noqa: F401
    except ImportError:
        return None
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        print(result.stdout[-10000:], result.stderr[-10000:], sep="\n")
        print(f"replay: {' '.join(command)}", flush=True)
    return result.returncode


def main() -> int:
    """Fuzz until the time is over. Returns 1 if a property fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="time after which no further round starts")
    parser.add_argument(
        "--seed", type=int, default=random.randrange(2**31), help="seed of the first round; the next is one more"
    )
    options = parser.parse_args()
    started, guided = time.monotonic(), itertools.cycle(properties())
    for number in itertools.count():
        left = options.seconds - (time.monotonic() - started)
        if left <= 0:
            return 0
        seed, name = options.seed + number, next(guided)
        statuses = [run_hypothesis(seed, left)]
        if (left := options.seconds - (time.monotonic() - started)) >= 1 and not statuses[0]:
            statuses.append(run_guided(name, seed, min(_GUIDED_SECONDS, left)))
        shown = ", ".join("not finished" if status is None else "failed" if status else "passed" for status in statuses)
        spent = time.monotonic() - started
        print(f"round {number + 1}, seed {seed}, guided {name}: {shown}; {spent:.0f} of {options.seconds:.0f} s", flush=True)
        if any(statuses):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

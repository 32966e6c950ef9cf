"""Runs benchmarks: `python -m benchmarks [NAME …]`. Writes a JSON file for each, a table and plots to `benchmarks/results`."""

import argparse
import importlib
import sys
import time
from collections.abc import Sequence

from benchmarks import report, result
from benchmarks.options import Options

MODULES = {
    "wire": "benchmarks.transfer",
    "narrow": "benchmarks.narrow",
    "preprocessing": "benchmarks.preprocessing",
    "encoder": "benchmarks.encoder",
    "gateway": "benchmarks.gateway",
    "overlap": "benchmarks.overlap",
    "reuse": "benchmarks.reuse",
    "early-prefill": "benchmarks.early_prefill",
    "overload": "benchmarks.overload",
    "degradation": "benchmarks.degradation",
    "scheduling": "benchmarks.scheduling",
    "interference": "benchmarks.interference",
    "equal-hardware": "benchmarks.equal_hardware",
    "baselines": "benchmarks.baselines",
    "plan": "benchmarks.plan",
}
"""Module of each benchmark by its public name, in the order in which all of them run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the named benchmarks, or all. Missed targets are reported; they do not fail the run.

    Returns the exit status: 1 if a benchmark could not run.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*MODULES, []], metavar="NAME", help=f"one of {', '.join(MODULES)}")
    parser.add_argument("--baseline", help="Python of an environment with stock vLLM and torchvision (make baseline)")
    parser.add_argument("--quick", action="store_true", help="two repeats each: a smoke test, not a measurement")
    parsed = parser.parse_args(arguments)
    options = Options(baseline=parsed.baseline, quick=parsed.quick)
    result.FOLDER.mkdir(exist_ok=True)  # benchmarks draw into it before their result is written
    failures = [name for name in parsed.names or MODULES if not _run(name, options)]
    report.write()
    return 1 if failures else 0


def _run(name: str, options: Options) -> bool:
    """Run one benchmark and write its result. Returns whether it ran to its end."""
    started_at = time.monotonic()
    print(f"{name} …", file=sys.stderr, flush=True)
    try:
        measured = importlib.import_module(MODULES[name]).run(options)
    except Exception as error:
        print(f"{name} failed after {time.monotonic() - started_at:.0f} s: {type(error).__name__}: {error}", file=sys.stderr)
        return False
    file = result.write(measured, options.quick)
    verdict = "met" if measured.met else "missed"
    print(f"{name:<16} {measured.ratio:8.2f}  target {measured.target:g} {verdict}  spread {measured.spread:.0%}", flush=True)
    print(f"{name}: {time.monotonic() - started_at:.0f} s, {file}", file=sys.stderr)
    return True


if __name__ == "__main__":
    sys.exit(main())

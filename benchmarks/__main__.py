"""`python -m benchmarks [NAME …]`: run, and leave in `benchmarks/results` a JSON file each, a table and pictures of all."""

import argparse
import importlib
import sys
import time
from collections.abc import Sequence

from benchmarks import report, result
from benchmarks.options import Options

MODULES = {
    "wire": "benchmarks.wire_speed",
    "preprocessing": "benchmarks.preprocessing",
    "encoder": "benchmarks.encoder",
    "gateway": "benchmarks.gateway",
    "overlap": "benchmarks.overlap",
    "reuse": "benchmarks.reuse",
    "interference": "benchmarks.interference",
    "equal-hardware": "benchmarks.equal_hardware",
    "plan": "benchmarks.plan",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 where a benchmark could not run. A target that is missed is no failure: it is said."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*MODULES, []], metavar="NAME", help=", ".join(MODULES))
    parser.add_argument("--baseline", help="Python of an environment with stock vLLM and torchvision: make baseline")
    parser.add_argument("--quick", action="store_true", help="fewer repeats: whether it runs, not how fast")
    said = parser.parse_args(arguments)
    options = Options(baseline=said.baseline, quick=said.quick)
    result.FOLDER.mkdir(exist_ok=True)  # for what a benchmark draws, and what is written of it
    failed = []
    for name in said.names or MODULES:
        began = time.monotonic()
        print(f"{name} …", file=sys.stderr, flush=True)
        try:
            found = importlib.import_module(MODULES[name]).run(options)
        except Exception as error:
            failed.append(name)
            print(f"{name} failed after {time.monotonic() - began:.0f} s: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        file = result.write(found, options.quick)
        verdict = "met" if found.met else "missed"
        print(f"{name:<16} {found.ratio:8.2f}  target {found.target:g} {verdict}  spread {found.spread:.0%}", flush=True)
        print(f"{name}: {time.monotonic() - began:.0f} s, {file}", file=sys.stderr)
    report.write()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

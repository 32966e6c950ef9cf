"""The command `dvd`: each process, and the tools around them.

The programs of the processes are executed, never imported: a container image contains only one of them.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence

from common import logs
from common.checkpoint import CheckpointError
from common.hub import find_checkpoint
from common.options import ConfigError, read_options
from dvd.config import DescribeOptions

USAGE = """usage: dvd COMMAND [options]

processes
  up MODEL        all processes of one machine, in the foreground
  gateway         the OpenAI-compatible HTTP server in front of the workers
  vision MODEL    one vision worker
  language MODEL  one language worker [-- any vllm serve flag]

tools
  describe MODEL  print the description of a checkpoint as JSON
  health ADDRESS  check whether a worker or a gateway can do its work, by exit status
  plan FILE       compute how many workers a load needs, from measured costs

MODEL is the folder of a checkpoint, or ORG/NAME[@REVISION] of a repository on
Hugging Face's hub. dvd COMMAND --help lists the options of a command.
"""

_PROCESSES = {
    "gateway": ("server", "fastapi"),
    "vision": ("vision_worker", "torch"),
    "language": ("lm_worker", "vllm"),
}
"""For each process: its package, and a library that only its extra (`pip install dvd-serve[vision]`) installs."""

_INFORMATIVE_FLAGS = {"-h", "--help", "--print-config"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. Exits 2 on an invalid command or option, 1 if a command fails; both with one line on stderr."""
    command, *rest = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE, end="")
    elif command in _PROCESSES:
        _execute(command, rest)
    elif command in _TOOLS:
        _TOOLS[command](rest)
    else:
        print(f"dvd: unknown command {command!r}: dvd --help lists the commands", file=sys.stderr)
        sys.exit(2)


def _execute(command: str, arguments: Sequence[str]) -> None:
    """Replace this process by the program of a gateway or worker."""
    package, library = _PROCESSES[command]
    if not _is_installed(package):
        sys.exit(f"dvd {command}: not installed here: package {package}")
    if not _is_installed(library) and not _INFORMATIVE_FLAGS & set(arguments):
        sys.exit(f"dvd {command}: not installed here: {library}; pip install 'dvd-serve[{command}]'")
    # -P: a file of that name in the current folder must not be run instead
    os.execv(sys.executable, [sys.executable, "-P", "-m", package, *arguments])


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def _up(arguments: Sequence[str]) -> None:
    missing = [package for package, _ in _PROCESSES.values() if not _is_installed(package)]
    if missing:
        sys.exit(f"dvd up: not installed here: package {missing[0]}; dvd up runs all processes")
    from dvd.up import main as up  # here, not at import: it needs the packages of all processes

    up(arguments)


def _describe(arguments: Sequence[str]) -> None:
    try:
        options = read_options(DescribeOptions, arguments)
    except ConfigError as error:
        print(f"dvd describe: {error}", file=sys.stderr)
        sys.exit(2)
    logs.configure(options.log_level, options.log_format, "common")
    try:
        print(json.dumps(find_checkpoint(options.model).as_json(), indent=2))
    except CheckpointError as error:
        sys.exit(f"dvd describe: {error}")


def _plan(arguments: Sequence[str]) -> None:
    from dvd.plan.command import main as plan

    sys.exit(plan(arguments))


def _health(arguments: Sequence[str]) -> None:
    from dvd.health import main as health

    health(arguments)


_TOOLS: dict[str, Callable[[Sequence[str]], None]] = {"up": _up, "describe": _describe, "plan": _plan, "health": _health}

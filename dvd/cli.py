"""The command `dvd`: each process, and the tools around them.

The programs of the processes are executed, never imported: a container image contains only one of them.
"""

import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence

from common import logs
from common.options import ConfigError, logging_options, read_options
from dvd import relay
from dvd.caches import NoWritableFolderError, use_writable_home

USAGE = """usage: dvd COMMAND [options]

processes
  up MODEL        all processes of one machine, in the foreground
  gateway         the OpenAI-compatible HTTP server in front of the workers
  vision MODEL    one vision worker
  language MODEL  one language worker [-- any vllm serve flag]

tools
  describe MODEL  print the description of a checkpoint as JSON
  health ADDRESS  check whether a worker or a gateway can do its work, by exit status
  drain ADDRESS   let a process finish its requests and exit
  plan FILE       compute how many workers a load needs, from measured costs
  --version       print the version

MODEL is the folder of a checkpoint, or ORG/NAME[@REVISION] of a repository on
Hugging Face's hub. dvd COMMAND --help lists the options of a command.
"""

_PROCESSES = {
    "gateway": ("server", "fastapi"),
    "vision": ("vision_worker", "torch"),
    "language": ("lm_worker", "vllm"),
}
"""For each process: its package, and a library that only its extra (`pip install dvd-serve[vision]`) installs."""

_RELAYED = {"vision", "language"}
"""Processes whose libraries print what is neither JSON nor meant for operators."""

_INFORMATIVE_FLAGS = {"-h", "--help", "--print-config"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. Exits 2 on an invalid command or option, 1 if a command fails; both with one line on stderr."""
    command, *rest = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE, end="")
    elif command == "--version":
        print(f"dvd-serve {importlib.metadata.version('dvd-serve')}")
    elif command in _PROCESSES:
        _run_process(command, rest)
    elif command in _TOOLS:
        _TOOLS[command](rest)
    else:
        print(f"dvd: unknown command {command!r}: dvd --help lists the commands", file=sys.stderr)
        sys.exit(2)


def _run_process(command: str, arguments: Sequence[str]) -> None:
    """Run the program of a gateway or worker in place of this process, or below it where its output must be filtered."""
    package, library = _PROCESSES[command]
    options = logging_options(arguments)
    informative = bool(_INFORMATIVE_FLAGS & set(arguments))
    if not _is_installed(package):
        logs.exit_with_error(f"dvd {command}", f"not installed here: package {package}", options.log_format)
    if not _is_installed(library) and not informative:
        reason = f"not installed here: {library}; pip install 'dvd-serve[{command}]'"
        logs.exit_with_error(f"dvd {command}", reason, options.log_format)
    # -P: a file of that name in the current folder must not be run instead
    program = [sys.executable, "-P", "-m", package, *arguments]
    if informative:
        os.execv(sys.executable, program)
    if command in _RELAYED:
        _find_home(command, options.log_format)
    if command in _RELAYED or options.log_format == "json":
        relay.run(program, options)
    os.execv(sys.executable, program)


def _find_home(command: str, log_format: str) -> None:
    """Exit with one line if libraries find no folder for their caches."""
    try:
        use_writable_home(os.environ)
    except NoWritableFolderError as error:
        logs.exit_with_error(f"dvd {command}", str(error), log_format)


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def _up(arguments: Sequence[str]) -> None:
    log_format = logging_options(arguments).log_format
    missing = [package for package, _ in _PROCESSES.values() if not _is_installed(package)]
    if missing:
        logs.exit_with_error("dvd up", f"not installed here: package {missing[0]}; dvd up runs all processes", log_format)
    from dvd.up import main as up  # here, not at import: it needs the packages of all processes

    _find_home("up", log_format)
    up(arguments)


def _describe(arguments: Sequence[str]) -> None:
    from common.checkpoint import CheckpointError
    from common.hub import find_checkpoint
    from dvd.config import DescribeOptions

    log_format = logging_options(arguments).log_format
    try:
        options = read_options(DescribeOptions, arguments)
        logs.configure(options.log_level, options.log_format)
        print(json.dumps(find_checkpoint(options.model).as_json(), indent=2))
    except ConfigError as error:
        logs.exit_with_error("dvd describe", str(error), log_format, 2)
    except CheckpointError as error:
        logs.exit_with_error("dvd describe", str(error), log_format)


def _plan(arguments: Sequence[str]) -> None:
    from dvd.plan.command import main as plan

    sys.exit(plan(arguments))


def _health(arguments: Sequence[str]) -> None:
    from dvd.health import main as health

    health(arguments)


def _drain(arguments: Sequence[str]) -> None:
    from dvd.drain import main as drain

    drain(arguments)


_TOOLS: dict[str, Callable[[Sequence[str]], None]] = {
    "up": _up,
    "describe": _describe,
    "plan": _plan,
    "health": _health,
    "drain": _drain,
}

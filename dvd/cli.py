"""`dvd up|gateway|vision|language|describe|plan`: one command for all processes.

A worker's own program is executed, never imported: this file runs in images that hold only one of the three.
"""

import json
import os
import sys
from collections.abc import Sequence

from common.checkpoint import CheckpointError, open_checkpoint
from common.options import ConfigError, read_options
from dvd.config import DescribeOptions

_WORKERS = {"vision": "vision_worker", "language": "lm_worker"}

USAGE = """usage: dvd COMMAND [options]

  up MODEL        all processes of one machine, in the foreground
  gateway         the OpenAI-compatible HTTP door
  vision MODEL    one vision worker
  language MODEL  one language worker [-- any vllm serve flag]
  describe MODEL  what a checkpoint is, as JSON
  plan FILE       how many workers to buy, from measured costs
  health ADDRESS  whether a worker or a gateway can do its work, by exit status

dvd COMMAND --help lists the options of one.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exits 2 on a bad command or option, 1 where a command cannot do its work; each with one line."""
    command, *rest = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE, end="")
    elif command in _WORKERS:
        os.execv(sys.executable, [sys.executable, "-m", _WORKERS[command], *rest])
    elif command in _COMMANDS:
        _COMMANDS[command](rest)
    else:
        sys.exit(_complain(f"unknown command {command!r}", "dvd --help lists them"))


def _up(arguments: Sequence[str]) -> None:
    from dvd.up import main as up

    up(arguments)


def _gateway(arguments: Sequence[str]) -> None:
    from server.__main__ import main as gateway

    gateway(arguments)


def _describe(arguments: Sequence[str]) -> None:
    try:
        options = read_options(DescribeOptions, arguments)
        print(json.dumps(open_checkpoint(options.model).as_json(), indent=2))
    except ConfigError as error:
        sys.exit(_complain("describe", str(error)))
    except CheckpointError as error:
        sys.exit(f"dvd describe: {error}")


def _plan(arguments: Sequence[str]) -> None:
    from dvd.plan.command import main as plan

    sys.exit(plan(arguments))


def _health(arguments: Sequence[str]) -> None:
    from dvd.health import main as health

    health(arguments)


_COMMANDS = {"up": _up, "gateway": _gateway, "describe": _describe, "plan": _plan, "health": _health}


def _complain(what: str, hint: str) -> int:
    print(f"dvd: {what}: {hint}", file=sys.stderr)
    return 2

"""Writes lm_worker/vllm_flags.txt: `python -m tests.lm_worker.vllm_flags > lm_worker/vllm_flags.txt`. Imports vLLM."""

from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser


def flags_of_vllm() -> str:
    """Return the whole file."""
    actions = make_arg_parser(FlexibleArgumentParser())._actions
    several = {flag: action.nargs in ("+", "*") for action in actions for flag in action.option_strings}
    return "".join(f"{flag}{' +' if several[flag] else ''}\n" for flag in sorted(several))


if __name__ == "__main__":
    print(flags_of_vllm(), end="")

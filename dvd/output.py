"""Lines that `dvd` prints on stderr: its own, and those of its child processes."""

import sys

from common import logs
from common.options import Options
from dvd.library_noise import is_noise


def print_status(text: str, log_format: str) -> None:
    """Print a line of `dvd up` itself."""
    logs.print_line("dvd", text, log_format)


def print_child_line(process: str, line: str, options: Options) -> None:
    """Print a line that a child process wrote, with the name of the process, unless it is noise of a library."""
    if options.log_level == "debug" or not is_noise(line):
        print(logs.format_child_line(process, line, options.log_format), file=sys.stderr, flush=True)

"""Lines that `dvd up` prints on stderr: its own and those of its child processes."""

import sys

from common import logs


def print_status(text: str, log_format: str) -> None:
    """Print a line of `dvd up` itself."""
    line = logs.format_child_line("dvd", text, log_format) if log_format == "json" else f"dvd: {text}"
    print(line, file=sys.stderr, flush=True)


def print_child_line(process: str, line: str, log_format: str) -> None:
    """Print a line that a child process wrote, with the name of the process."""
    print(logs.format_child_line(process, line, log_format), file=sys.stderr, flush=True)

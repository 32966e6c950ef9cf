"""Types of arguments of tools that need no `Options`. Their messages name the value and what was expected."""

import argparse
import math
import re
import tempfile
from contextlib import suppress
from pathlib import Path


def positive_number(text: str) -> float:
    """Parse a finite number above 0. Raises `ArgumentTypeError`."""
    with suppress(ValueError):
        value = float(text)
        if 0 < value < math.inf:  # not NaN
            return value
    raise argparse.ArgumentTypeError(f"expected a number above 0, not {text!r}")


def positive_integer(text: str) -> int:
    """Parse a whole number above 0. Raises `ArgumentTypeError`."""
    if re.fullmatch("0*[1-9][0-9]{0,17}", text, re.ASCII):
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number above 0, not {text!r}")


def create_results_folder(parser: argparse.ArgumentParser, option: str, folder: Path) -> None:
    """Create the folder that an option names. Ends the program with a usage error if no file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        parser.error(f"argument {option}: expected a folder for results, or a place for one, not {str(folder)!r}: {reason}")

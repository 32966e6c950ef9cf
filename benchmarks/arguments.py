"""Types of command line arguments, whose messages name the value and what was expected."""

import argparse
import math
import re
from contextlib import suppress


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


def image_size(text: str) -> tuple[int, int]:
    """Parse `WIDTHxHEIGHT` in pixels. Raises `ArgumentTypeError`."""
    if match := re.fullmatch("([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text.lower(), re.ASCII):
        return int(match[1]), int(match[2])
    raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT in pixels, as in 896x448, not {text!r}")

"""What the scripts of client libraries share: the test's settings, and the report of their cases.

The scripts run in an environment of their own, without dvd-serve and its tests.
"""

import json
import os
import traceback
from collections.abc import Callable
from typing import Any, Literal

from client_settings import Settings
from pydantic import BaseModel


class Shape(BaseModel):
    """The shape in the image. Every value is bounded: the weights are random, and a string would never end."""

    colour: Literal["red", "green", "blue"]
    large: bool


SETTINGS = Settings(**json.loads(os.environ["CLIENT_SETTINGS"]))
WRONG_KEY = "wrong"


def base64_of(url: str) -> str:
    """Return the base64 text of a `data:` URL."""
    return url.partition(",")[2]


def error_of(call: Callable[[], Any]) -> dict[str, Any]:
    """Return what a client raises: the names of the exception's classes, its HTTP status and its text."""
    try:
        result = call()
    except Exception as error:
        classes = [f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__]
        return {"classes": classes, "status": _status(error), "message": str(error)}
    raise AssertionError(f"no error, but {result}")


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status of an exception or of its cause."""
    while error is not None:
        if (status := getattr(error, "status_code", None)) is not None:
            return status
        error = error.__cause__
    return None


def run(cases: dict[str, Callable[[], Any]]) -> None:
    """Run all cases and print their results as one line of JSON; a case that fails reports its traceback."""
    print("\n" + json.dumps({name: _result(case) for name, case in cases.items()}))


def _result(case: Callable[[], Any]) -> Any:
    try:
        return case()
    except Exception:
        return {"traceback": traceback.format_exc()}

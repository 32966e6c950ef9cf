"""The table of errors says what there is."""

import re
from pathlib import Path

from common import errors
from common.options import flag_name
from tests.option_classes import COMMANDS

PAGE = (Path(__file__).parents[2] / "docs/api.md").read_text()


def table() -> dict[str, int]:
    rows = re.findall(r"^\| (\d{3}) \| (`.*?`) \|", PAGE, re.M)
    return {code: int(status) for status, codes in rows for code in re.findall(r"`(\w+)`", codes)}


def test_every_code_is_there_with_its_status() -> None:
    known = {error.code: error.status.value for error in errors.all_errors()}
    assert table() == known | {"engine_error": 500}


def test_every_option_that_is_named_there_is_one() -> None:
    options = {flag_name(name) for command in COMMANDS.values() for name in command.model_fields}
    named = set(re.findall(r"`(--[a-z-]+)`", PAGE))
    assert named
    assert named <= options

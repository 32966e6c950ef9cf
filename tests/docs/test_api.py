"""docs/api.md lists every error code with its status, and names only options that exist."""

import re
from pathlib import Path

from common import errors
from common.options import flag_name
from tests.option_classes import COMMANDS

PAGE = (Path(__file__).parents[2] / "docs/api.md").read_text()


def documented_codes() -> dict[str, int]:
    rows = re.findall(r"^\| (\d{3}) \| (`.*?`) \|", PAGE, re.M)
    return {code: int(status) for status, codes in rows for code in re.findall(r"`(\w+)`", codes)}


def test_every_error_code_is_documented_with_its_status() -> None:
    known = {error.code: error.status.value for error in errors.all_errors()}
    assert documented_codes() == known | {"engine_error": 500}


def test_every_option_on_the_page_exists() -> None:
    options = {flag_name(name) for command in COMMANDS.values() for name in command.model_fields}
    named = set(re.findall(r"`(--[a-z-]+)`", PAGE))
    assert named
    assert named <= options

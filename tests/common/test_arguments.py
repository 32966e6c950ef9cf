import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common import arguments

WRONG: list[tuple[Callable[[str], Any], str, str]] = [
    *((arguments.positive_number, text, "a number above 0") for text in ("", "x", "0", "-1", "nan", "inf", "1,5")),
    *((arguments.positive_integer, text, "a whole number above 0") for text in ("", "x", "0", "-1", "1.5", "9" * 19, "²")),
]


@pytest.mark.parametrize(("parse", "text", "expected"), WRONG)
def test_the_message_has_the_value_and_what_was_expected(parse: Callable[[str], Any], text: str, expected: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as error_info:
        parse(text)
    assert str(error_info.value) == f"expected {expected}, not {text!r}"


def test_values() -> None:
    assert arguments.positive_number("0.5") == 0.5
    assert arguments.positive_integer("007") == 7


def test_a_folder_for_results_is_created(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    arguments.create_results_folder(argparse.ArgumentParser(), "--out", folder)
    assert folder.is_dir()
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", ["file", "file/results"])
def test_a_folder_that_cannot_be_created_is_a_usage_error(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        arguments.create_results_folder(argparse.ArgumentParser(), "--out", tmp_path / name)
    expected = f"argument --out: expected a folder for results, or a place for one, not '{tmp_path}/{name}': "
    assert expected in capsys.readouterr().err


def test_a_folder_in_which_no_file_can_be_created_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        arguments.create_results_folder(argparse.ArgumentParser(), "--out", Path("/proc/self"))
    assert "not '/proc/self': " in capsys.readouterr().err

import argparse
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import arguments, load_test
from benchmarks.gpu import __main__ as gpu_kit

WRONG: list[tuple[Callable[[str], Any], str, str]] = [
    *((arguments.positive_number, text, "a number above 0") for text in ("", "x", "0", "-1", "nan", "inf", "1,5")),
    *((arguments.positive_integer, text, "a whole number above 0") for text in ("", "x", "0", "-1", "1.5", "9" * 19, "²")),
    *((arguments.image_size, text, "WIDTHxHEIGHT") for text in ("", "896", "0x5", "896x", "-1x5", "1e3x5", "100000x5")),
]


@pytest.mark.parametrize(("parse", "text", "expected"), WRONG)
def test_the_message_has_the_value_and_what_was_expected(parse: Callable[[str], Any], text: str, expected: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as error_info:
        parse(text)
    assert f"expected {expected}" in str(error_info.value)
    assert str(error_info.value).endswith(f"not {text!r}")


def test_values() -> None:
    assert arguments.positive_number("0.5") == 0.5
    assert arguments.positive_integer("007") == 7
    assert arguments.image_size("896X448") == (896, 448)


@pytest.mark.parametrize(
    ("main", "option", "value"),
    [(load_test.main, "--rates", "-1"), (load_test.main, "--size", "896"), (load_test.main, "--tokens", "0"),
     (gpu_kit.main, "--seconds", "nan")],
)  # fmt: skip
def test_a_command_ends_before_it_does_anything(
    main: Callable[[list[str]], int], option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([f"{option}={value}" if option != "--rates" else option, *([value] if option == "--rates" else [])])
    assert f"argument {option}: expected" in capsys.readouterr().err

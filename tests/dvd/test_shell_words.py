"""ARGS of the Makefile: words as a shell splits them, and JSON without quotes around it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dvd.shell_words import split

ROOT = Path(__file__).parents[2]
NESTED = '{"a": {"b": [1, "it\'s }"]}, "c": " "}'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("--port 1  --x=\"a b\" 'c d' e\\ f", ["--port", "1", "--x=a b", "c d", "e f"]),
        ('-- --override-generation-config {"a": 1}', ["--", "--override-generation-config", '{"a": 1}']),
        ("""--x '{"a": {"b": 1}}'""", ["--x", '{"a": {"b": 1}}']),
        (f"--x={NESTED} -O3", [f"--x={NESTED}", "-O3"]),
        (f"--x {NESTED}", ["--x", NESTED]),
        ('--y ["a", "b"] c', ["--y", '["a", "b"]', "c"]),
        ("--x {a b}", ["--x", "{a", "b}"]),
        ("--x \"a {'b': 1}\"", ["--x", "a {'b': 1}"]),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert split(text) == words


def test_a_quote_that_is_not_closed_is_one_line() -> None:
    command = [sys.executable, "-m", "dvd.shell_words", "dvd", "--x 'a"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (2, "ARGS=--x 'a: no closing quotation\n")


@pytest.mark.parametrize("text", [NESTED, '{"a": 1}', "'{\"a\": 1}'"])
def test_make_serve_passes_json_on(tmp_path: Path, text: str) -> None:
    """Runs the recipe that `make --dry-run` prints, with a program in the place of `dvd` that prints its arguments."""
    stub = tmp_path / "dvd"
    stub.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    stub.chmod(0o755)
    arguments = f"-- --override-generation-config {text}"
    make = ["make", "--no-print-directory", "--dry-run", "serve", "DEVICE=cpu", f"ARGS={arguments}"]
    recipe = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    recipe = recipe.replace(".venv/bin/python", sys.executable).replace(".venv/bin/dvd", str(stub))
    result = subprocess.run(["sh", "-c", recipe], cwd=ROOT, capture_output=True, text=True, check=True)
    expected = text.strip("'") if text.startswith("'") else text
    assert json.loads(result.stdout) == [
        "up",
        "demo/checkpoint",
        "--port",
        "8000",
        "--",
        "--override-generation-config",
        expected,
    ]

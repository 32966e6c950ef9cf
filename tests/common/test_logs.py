"""Log records on stderr."""

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from common import logs

NAME = "test.logs"


@pytest.fixture
def output() -> Iterator[io.StringIO]:
    """Yields what a logger with the JSON formatter writes."""
    logger, stream = logging.getLogger(NAME), io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonFormatter())
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.DEBUG)
    token = logs.request_id.set("")
    yield stream
    logs.request_id.reset(token)
    logger.handlers, logger.propagate = [], True


def test_a_record_is_one_json_object_on_a_line(output: io.StringIO) -> None:
    logs.request_id.set("abc")
    logging.getLogger(NAME).warning("two\nlines of %s", "é", extra=logs.extra_fields(status=200, error=None, seconds=0.5))
    (line,) = output.getvalue().splitlines()
    record = json.loads(line)
    assert record.pop("time").endswith("Z")
    assert record == {
        "status": 200, "seconds": 0.5, "level": "warning", "logger": NAME, "message": "two\nlines of é", "request_id": "abc",
    }  # fmt: skip


def test_an_exception_is_a_field_of_the_record(output: io.StringIO) -> None:
    try:
        raise ValueError("7")
    except ValueError:
        logging.getLogger(NAME).exception("failed")
    (line,) = output.getvalue().splitlines()
    assert json.loads(line)["exception"].splitlines()[-1] == "ValueError: 7"
    assert "request_id" not in json.loads(line)


def test_extra_fields_do_not_replace_standard_fields(output: io.StringIO) -> None:
    logging.getLogger(NAME).info("true", extra=logs.extra_fields(message="false", level="none"))
    assert (json.loads(output.getvalue())["message"], json.loads(output.getvalue())["level"]) == ("true", "info")


def test_text_has_fields_between_message_and_traceback() -> None:
    record = logging.makeLogRecord(
        {"name": "a", "levelname": "INFO", "msg": "answered", **logs.extra_fields(route="/x", status=200)}
    )
    token = logs.request_id.set("abc")
    try:
        raise ValueError("7")
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    first, *rest = logs.TextFormatter().format(record).splitlines()
    logs.request_id.reset(token)
    assert first.endswith("INFO a: answered route=/x status=200 request=abc")
    assert rest[-1] == "ValueError: 7"


@pytest.mark.parametrize("text", ["a", "8f-1_.Z", "x" * 128])
def test_valid_request_ids(text: str) -> None:
    assert logs.is_valid_request_id(text)


@pytest.mark.parametrize("text", ["", "a b", "a\n", "é", "x" * 129, '"'])
def test_invalid_request_ids(text: str) -> None:
    assert not logs.is_valid_request_id(text)


def test_a_childs_line_becomes_a_json_object_unless_it_is_one() -> None:
    assert logs.format_child_line("vision-0", "ready", "text") == "    vision-0 | ready"
    assert logs.format_child_line("", "ready", "text") == "ready"
    assert logs.format_child_line("vision-0", '{"a": 1}', "json") == '{"a": 1}'
    record = json.loads(logs.format_child_line("vision-0", 'a "word"', "json"))
    assert (record["logger"], record["message"], record["level"]) == ("vision-0", 'a "word"', "info")


@pytest.mark.parametrize("line", ["{'a': 1}", "{}}", "[1]", "1", "{", ""])
def test_what_only_looks_like_an_object_becomes_one(line: str) -> None:
    assert json.loads(logs.format_child_line("", line, "json"))["message"] == line


def test_a_line_without_a_logger(capsys: pytest.CaptureFixture[str]) -> None:
    logs.print_line("dvd vision", "100 % wrong", "text", "error")
    logs.print_line("dvd vision", "100 % wrong", "json", "error")
    text, line = capsys.readouterr().err.splitlines()
    assert text == "dvd vision: 100 % wrong"
    record = json.loads(line)
    assert (record["logger"], record["message"], record["level"]) == ("dvd.vision", "100 % wrong", "error")


SCRIPT = """
import logging, sys, threading, warnings
from common import logs
logs.configure(*sys.argv[1:])
logs.configure(*sys.argv[1:])
logging.getLogger("dvd.vision").info("own")
logging.getLogger("uvicorn.error").info("info of a library")
logging.getLogger("uvicorn.error").warning("warning of a library")
warnings.warn("for developers", FutureWarning)
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
raise ValueError("two\\nlines")
"""


def run_script(level: str, log_format: str) -> list[str]:
    command = [sys.executable, "-c", SCRIPT, level, log_format]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    return result.stderr.splitlines()


def test_all_that_a_process_says_is_json() -> None:
    records = [json.loads(line) for line in run_script("debug", "json")]
    assert [(record["logger"], record["level"]) for record in records] == [
        ("dvd.vision", "info"), ("uvicorn.error", "info"), ("uvicorn.error", "warning"), ("py.warnings", "warning"),
        ("dvd", "critical"), ("dvd", "critical"),
    ]  # fmt: skip
    assert records[-2]["exception"].endswith("ZeroDivisionError: division by zero")
    assert records[-1]["exception"].endswith("ValueError: two\nlines")


def test_below_debug_level_libraries_only_warn() -> None:
    records = [json.loads(line) for line in run_script("info", "json")]
    assert [record["message"] for record in records[:2]] == ["own", "warning of a library"]
    assert len(records) == 4
    assert "own" not in "".join(run_script("warning", "text"))


def test_an_answer_of_a_command_is_json_if_its_log_is(capsys: pytest.CaptureFixture[str]) -> None:
    logs.print_answer("dvd health", "host:1: healthy", "text")
    logs.print_answer("dvd health", "host:1: healthy", "json")
    text, line = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert text == record["message"] == "host:1: healthy"
    assert record["logger"] == "dvd.health"

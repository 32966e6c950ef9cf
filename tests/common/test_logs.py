"""Log records on stderr."""

import io
import json
import logging
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
    assert logs.format_child_line("vision-0", '{"a": 1}', "json") == '{"a": 1}'
    record = json.loads(logs.format_child_line("vision-0", 'a "word"', "json"))
    assert (record["logger"], record["message"], record["level"]) == ("vision-0", 'a "word"', "info")


def test_configuring_twice_logs_once(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("test.logs.twice")
    for _ in range(2):
        logs.configure("info", "json", logger.name)
    logger.info("once")
    logger.debug("never")
    assert [json.loads(line)["message"] for line in capsys.readouterr().err.splitlines()] == ["once"]

"""What a process says on stderr."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from common import logs

NAME = "test.logs"


@pytest.fixture
def said() -> Iterator[io.StringIO]:
    """What a logger of its own writes as JSON."""
    logger, stream = logging.getLogger(NAME), io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.Json())
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.DEBUG)
    token = logs.request_id.set("")
    yield stream
    logs.request_id.reset(token)
    logger.handlers, logger.propagate = [], True


def test_a_record_is_one_object_a_line(said: io.StringIO) -> None:
    logs.request_id.set("abc")
    logging.getLogger(NAME).warning("two\nlines of %s", "é", extra=logs.extra_fields(status=200, error=None, seconds=0.5))
    (line,) = said.getvalue().splitlines()
    record = json.loads(line)
    assert record.pop("time").endswith("Z")
    assert record == {
        "status": 200, "seconds": 0.5, "level": "warning", "logger": NAME, "message": "two\nlines of é", "request_id": "abc",
    }  # fmt: skip


def test_an_exception_is_in_its_record(said: io.StringIO) -> None:
    try:
        raise ValueError("7")
    except ValueError:
        logging.getLogger(NAME).exception("failed")
    (line,) = said.getvalue().splitlines()
    assert json.loads(line)["exception"].splitlines()[-1] == "ValueError: 7"
    assert "request_id" not in json.loads(line)


def test_fields_do_not_replace_what_every_record_has(said: io.StringIO) -> None:
    logging.getLogger(NAME).info("true", extra=logs.extra_fields(message="false", level="none"))
    assert (json.loads(said.getvalue())["message"], json.loads(said.getvalue())["level"]) == ("true", "info")


def test_for_people_fields_stand_behind_the_message_and_before_a_traceback() -> None:
    record = logging.makeLogRecord(
        {"name": "a", "levelname": "INFO", "msg": "answered", **logs.extra_fields(route="/x", status=200)}
    )
    token = logs.request_id.set("abc")
    try:
        raise ValueError("7")
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    first, *rest = logs.Text().format(record).splitlines()
    logs.request_id.reset(token)
    assert first.endswith("INFO a: answered route=/x status=200 request=abc")
    assert rest[-1] == "ValueError: 7"


@pytest.mark.parametrize("said", ["a", "8f-1_.Z", "x" * 128])
def test_ids_that_are_harmless(said: str) -> None:
    assert logs.is_valid_request_id(said)


@pytest.mark.parametrize("said", ["", "a b", "a\n", "é", "x" * 129, '"'])
def test_ids_that_are_not(said: str) -> None:
    assert not logs.is_valid_request_id(said)


def test_a_childs_line_in_json_stays_an_object_or_becomes_one() -> None:
    assert logs.format_child_line("vision-0", "ready", "text") == "    vision-0 | ready"
    assert logs.format_child_line("vision-0", '{"a": 1}', "json") == '{"a": 1}'
    made = json.loads(logs.format_child_line("vision-0", 'a "word"', "json"))
    assert (made["logger"], made["message"], made["level"]) == ("vision-0", 'a "word"', "info")


def test_a_format_is_not_set_twice(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("test.logs.twice")
    for _ in range(2):
        logs.configure("info", "json", logger.name)
    logger.info("once")
    logger.debug("never")
    assert [json.loads(line)["message"] for line in capsys.readouterr().err.splitlines()] == ["once"]

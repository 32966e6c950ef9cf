"""Logging on stderr, one record a line: text for people, or a JSON object for machines (`--log-format`).

Every record has the id of the request that is being served. Records contain names, numbers and ids, never payloads, prompts
or keys.
"""

import json
import logging
import re
import sys
import threading
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import grpc.aio

REQUEST_ID_KEY = "x-request-id"
"""HTTP header and gRPC metadata key that carry a request's id between processes."""

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the request that this task serves; empty outside of a request."""

_VALID_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


_OWN_LOGGERS = ("dvd", "common", "server", "vision_worker", "lm_worker")
_VERBOSE_LIBRARIES = ("PIL", "numba")
"""At debug level they log every chunk of an image, and every instruction that is compiled."""

log = logging.getLogger("dvd")


def configure(level: str, log_format: str) -> None:
    """Send everything that this process has to say to stderr: log records, Python's warnings, and uncaught exceptions.

    Below debug level, libraries log warnings and errors only, and Python's warnings, which are for developers, are dropped.
    If the root logger has a handler already, it stays.

    Args:
        level: minimum severity, such as `info`.
        log_format: `text` or `json`.
    """
    root, debug = logging.getLogger(), level == "debug"
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_formatter(log_format))
        root.addHandler(handler)
        root.setLevel("DEBUG" if debug else "ERROR" if level == "error" else "WARNING")
    for name in _OWN_LOGGERS:
        logging.getLogger(name).setLevel(level.upper())
    for name in _VERBOSE_LIBRARIES:
        logging.getLogger(name).setLevel("INFO" if debug else "WARNING")
    logging.getLogger("py.warnings").setLevel("WARNING" if debug else "CRITICAL")
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda raised: _log_uncaught(raised.exc_type, raised.exc_value, raised.exc_traceback)


def print_answer(source: str, message: str, log_format: str) -> None:
    """Print the result of a command as one line to standard output.

    Args:
        source: the command, such as `dvd health`, which only JSON contains.
        message: the result.
        log_format: `text` or `json`.
    """
    print(message if log_format != "json" else _json_line(source, message, "info"))


def print_line(source: str, message: str, log_format: str, level: str = "info") -> None:
    """Print a line of a command that has no logger yet, or none at all: a status, or the reason why it cannot start.

    Args:
        source: the command, such as `dvd vision`.
        message: what it has to say.
        log_format: `text` or `json`.
        level: severity, which only JSON contains.
    """
    line = f"{source}: {message}" if log_format != "json" else _json_line(source, message, level)
    print(line, file=sys.stderr, flush=True)


def _json_line(source: str, message: str, level: str) -> str:
    fields = {"name": source.replace(" ", "."), "levelname": level, "msg": message}
    return JsonFormatter().format(logging.makeLogRecord(fields))


def exit_with_error(source: str, reason: str, log_format: str, status: int = 1) -> NoReturn:
    """Print the reason why a command cannot run, as one line, and exit.

    Args:
        source: the command, such as `dvd vision`.
        reason: what is wrong.
        log_format: `text` or `json`.
        status: exit status.
    """
    print_line(source, reason, log_format, "error")
    sys.exit(status)


def _log_uncaught(kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt) or error is None:
        sys.__excepthook__(kind, error or kind(), traceback)
    else:
        log.critical("ended by an unexpected error", exc_info=(kind, error, traceback))


def _formatter(log_format: str) -> logging.Formatter:
    return JsonFormatter() if log_format == "json" else TextFormatter()


def is_valid_request_id(text: str) -> bool:
    """Return whether an id from a caller is safe to log and to pass on: at most 128 letters, digits, `.`, `_` and `-`."""
    return bool(_VALID_ID.fullmatch(text))


def request_metadata() -> tuple[tuple[str, str], ...]:
    """Return the gRPC metadata of a call on behalf of the current request: its id."""
    value = request_id.get()
    return ((REQUEST_ID_KEY, value),) if value else ()


def adopt_request_id(context: "grpc.aio.ServicerContext[Any, Any]") -> None:
    """Set the request id of this gRPC call to the one that its caller sent, if it is valid."""
    value = next((value for key, value in context.invocation_metadata() or () if key == REQUEST_ID_KEY), "")
    if isinstance(value, str) and is_valid_request_id(value):
        request_id.set(value)


class TextFormatter(logging.Formatter):
    """Formats for people.

    `2026-01-31 12:00:00,000 INFO dvd.access: answered route=/v1/models status=200 request=8f14…`
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Return the message with its extra fields and the request id after it."""
        fields = _fields(record) | ({"request": name} if (name := request_id.get()) else {})
        return " ".join([super().formatMessage(record), *(f"{key}={value}" for key, value in fields.items())])


class JsonFormatter(logging.Formatter):
    """Formats as JSON, in one line.

    `{"time": "2026-01-31T12:00:00.000Z", "level": "info", "logger": "dvd.access", "message": "answered", …}`
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line. Extra fields never replace the standard ones."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        standard: dict[str, Any] = {
            "time": time, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage(),
        }  # fmt: skip
        if name := request_id.get():
            standard["request_id"] = name
        if record.exc_info:
            standard["exception"] = self.formatException(record.exc_info)
        return json.dumps(_fields(record) | standard, ensure_ascii=False, default=str)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return the fields logged with `extra=extra_fields(…)`."""
    return dict(getattr(record, "fields", {}))


def extra_fields(**values: Any) -> dict[str, Any]:
    """Return the argument `extra` of a logging call: fields in addition to the message, without those that are None."""
    return {"fields": {key: value for key, value in values.items() if value is not None}}


def format_child_line(process: str, line: str, log_format: str) -> str:
    """Return a child process' line as its parent prints it. In JSON, a line that is an object already stays unchanged.

    Args:
        process: name of the child; empty if the parent has only one, whose lines of text then stay unchanged.
        line: the line.
        log_format: `text` or `json`.
    """
    if log_format != "json":
        return f"{process:>12} | {line}" if process else line
    if _is_object(line):
        return line
    return JsonFormatter().format(logging.makeLogRecord({"name": process or "stderr", "levelname": "INFO", "msg": line}))


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False

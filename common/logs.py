"""What a process says on stderr, a record a line: for people, or one JSON object for machines (`--log-format`).

Every record names the request that was being served. Records hold names, numbers and ids, never payloads, prompts or keys.
"""

import json
import logging
import re
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import grpc.aio

METADATA = "x-request-id"
"""Under which a request's id goes from one process to the next."""

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Of the request that this task serves; empty outside of one."""

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def configure(level: str, form: str, *names: str) -> None:
    """Send what is logged under these names, or by everybody where there are none, to stderr as `text` or `json`.

    Where somebody has said already what becomes of it, that stays.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Json() if form == "json" else Text())
    for logger in map(logging.getLogger, names or ("",)):
        if not logger.handlers:
            logger.addHandler(handler)
            logger.propagate = False
            logger.setLevel(level.upper())
    logging.getLogger("PIL").setLevel(logging.INFO)  # at debug it lists every chunk of every image


def is_valid_request_id(said: str) -> bool:
    """Whether an id from outside is harmless."""
    return bool(_ID.fullmatch(said))


def request_metadata() -> tuple[tuple[str, str], ...]:
    """The request's id, for a gRPC call that is made for it."""
    name = request_id.get()
    return ((METADATA, name),) if name else ()


def adopt_request_id(context: "grpc.aio.ServicerContext[Any, Any]") -> None:
    """Serve this gRPC call under the id that its caller sent, if that is one."""
    said = next((value for key, value in context.invocation_metadata() or () if key == METADATA), "")
    if isinstance(said, str) and is_valid_request_id(said):
        request_id.set(said)


class Text(logging.Formatter):
    """`2026-01-31 12:00:00,000 INFO dvd.access: answered route=/v1/models status=200 request=8f14…`"""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        fields = _fields(record) | ({"request": name} if (name := request_id.get()) else {})
        return " ".join([super().formatMessage(record), *(f"{key}={value}" for key, value in fields.items())])


class Json(logging.Formatter):
    """`{"time": "2026-01-31T12:00:00.000Z", "level": "info", "logger": "dvd.access", "message": "answered", …}`"""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        said: dict[str, Any] = {
            "time": time, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage(),
        }  # fmt: skip
        if name := request_id.get():
            said["request_id"] = name
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(_fields(record) | said, ensure_ascii=False, default=str)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What was logged with `extra=fields(…)`."""
    return dict(getattr(record, "fields", {}))


def extra_fields(**values: Any) -> dict[str, Any]:
    """For `extra` of a logging call: values of their own beside the message; those that are None are left out."""
    return {"fields": {key: value for key, value in values.items() if value is not None}}


def format_child_line(process: str, line: str, form: str) -> str:
    """A line of a child process as its parent prints it; in JSON one that already is an object stays as it is."""
    if form != "json":
        return f"{process:>12} | {line}"
    if line.startswith("{") and line.endswith("}"):
        return line
    return Json().format(logging.makeLogRecord({"name": process, "levelname": "INFO", "msg": line}))

"""Generates docs/configuration.md from the options classes: `python -m tests.docs.reference > docs/configuration.md`."""

import types
import typing
from collections import defaultdict

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from common.options import PREFIX, default_text, flag_name
from tests.option_classes import COMMANDS

HEAD = f"""# Configuration

Generated from the options classes (`make docs`); a test fails if it is out of date.

Each option can be set in three places. A flag overrides a variable, and a variable overrides the file.

| place | example |
|---|---|
| flag | `--max-in-flight 64` |
| variable | `{PREFIX}MAX_IN_FLIGHT=64` |
| key of the YAML file named by `--config` or `{PREFIX}CONFIG` | `max_in_flight: 64` |

* One file may serve all commands: each command ignores the keys of others. An unknown key, variable or flag is an error.
* `--print-config` prints the configuration in force and exits. Secrets are masked.
* `dvd up` and `dvd language` pass flags after `--` on to `vllm serve`. A file has them as the mapping `vllm`.
* White space around the value of a variable is removed. Variables that Kubernetes sets for a service are ignored.
* `dvd plan --help` lists the options of `dvd plan`, which are flags only.

| option | commands | values | default | description |
|---|---|---|---|---|
"""


def reference() -> str:
    """Return the whole file: a row for each option, or several if it differs between commands."""
    rows: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
    for command, options in COMMANDS.items():
        for name, field in options.model_fields.items():
            rows[name, _values(field), _default(field), str(field.description)].append(command)
    lines = [
        f"| `{flag_name(name)}` | {', '.join(commands)} | {values} | {default} | {_escaped(description)} |"
        for (name, values, default, description), commands in sorted(rows.items())
    ]
    return HEAD + "\n".join(lines) + "\n"


def _values(field: FieldInfo) -> str:
    annotation = field.annotation
    if isinstance(annotation, types.UnionType):
        annotation = next(member for member in typing.get_args(annotation) if member is not type(None))
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    known = {bool: "`true`, `false`", int: "whole number", float: "number", SecretStr: "secret"}
    containers: dict[typing.Any, str] = {list: "list", dict: "mapping"}
    kind = containers.get(typing.get_origin(annotation)) or known.get(typing.cast(type, annotation), "text")
    bounds = [f"{sign} {value}" for sign, value in map(_bound, field.metadata) if sign]
    return f"{kind} {', '.join(bounds)}" if bounds and kind in ("whole number", "number") else kind


def _bound(constraint: object) -> tuple[str, object]:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return next(((sign, getattr(constraint, name)) for name, sign in signs.items() if hasattr(constraint, name)), ("", None))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    text = default_text(field)
    return "unset" if text is None else f"`{text}`"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(reference(), end="")

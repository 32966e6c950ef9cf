"""docs/configuration.md, from the schema of the options: `python -m tests.docs.reference > docs/configuration.md`."""

import types
import typing
from collections import defaultdict

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from common.options import PREFIX, flag_name
from tests.option_classes import COMMANDS

HEAD = f"""# Configuration

Generated from the schema of the options (`make docs`); a test holds it against that.

Each option is a flag (`--max-in-flight 64`), a variable (`{PREFIX}MAX_IN_FLIGHT=64`) and a key of the file that
`--config FILE.yaml` or `{PREFIX}CONFIG` names (`max_in_flight: 64`); the first that is there counts. One file may serve
all commands. `--print-config` prints what is in force, secrets masked. What `dvd language` and `dvd up` have after `--` goes to
vLLM as it is. Options of `dvd plan` are in its `--help`.

| option | commands | values | default | |
|---|---|---|---|---|
"""


def reference() -> str:
    """The whole file: a row for each option, or for each of its meanings where commands differ."""
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
        annotation = next(one for one in typing.get_args(annotation) if one is not type(None))
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    known = {bool: "`true`, `false`", int: "whole number", float: "number", SecretStr: "secret"}
    kind = "list" if typing.get_origin(annotation) is list else known.get(typing.cast(type, annotation), "text")
    bounds = [f"{sign} {value}" for sign, value in map(_bound, field.metadata) if sign]
    return f"{kind} {', '.join(bounds)}" if bounds and kind in ("whole number", "number") else kind


def _bound(said: object) -> tuple[str, object]:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return next(((sign, getattr(said, name)) for name, sign in signs.items() if hasattr(said, name)), ("", None))


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "must be said"
    if field.default is None:
        return "–"
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(reference(), end="")

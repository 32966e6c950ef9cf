"""Options of the commands: a flag, a `DVD_*` variable and a key of `--config FILE.yaml`, in that order of precedence.

This module is the machinery and the options that several processes share. The options of one process are in the `config.py` of
its package. One file may serve all commands: a key that belongs to another command is ignored, an unknown key is an error.
Options are read once, frozen, and passed down.
"""

import argparse
import difflib
import json
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_core import PydanticUndefined

PREFIX = "DVD_"

ADDRESS_PATTERN = r"unix:/.+|[^:/]+:\d+|\[[0-9a-fA-F:]+\]:\d+"
Address = Annotated[str, Field(pattern=rf"^({ADDRESS_PATTERN})$")]

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Pillow's names. The gateway and the vision worker accept the same formats."""

KNOWN_NAMES = frozenset({
    "address", "allow_private_images", "allow_vir", "api_key", "cache", "device", "docs", "fetch_timeout", "host", "http",
    "language_workers", "listen", "load_format", "log_format", "log_level", "max_batch_tiles", "max_body_bytes",
    "max_image_bytes", "max_image_pixels", "max_images", "max_in_flight", "max_tiles", "max_video_bytes", "metrics_port",
    "model", "port", "prepare_threads", "request_timeout", "router_scope", "sink_bytes", "sink_lease", "stream_keep_alive",
    "timeout", "trace", "vir", "vir_absolute_threshold", "vir_relative_threshold", "vision_backend", "vision_compile",
    "vision_dtype", "vision_workers", "wait_for_embeddings", "workers",
})  # fmt: skip
"""Names of the options of all commands. A process must recognise the names of others, whose packages it may not have."""


class ConfigError(Exception):
    """An option is unknown or has an invalid value. The message is one line and names the option."""


class Options(BaseModel):
    """Options of every command."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    command: ClassVar[str]
    """The command's name: `dvd COMMAND`."""

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="minimum severity of log records")
    log_format: Literal["text", "json"] = Field("text", description="text for people, or one JSON object a line")


class MetricsOptions(Options):
    """Options of a process that serves Prometheus metrics on a port of their own."""

    metrics_port: int = Field(0, ge=0, le=65535, description="port of the Prometheus endpoint; 0: no endpoint")


class TraceOptions(Options):
    """Options of a process that records a trace."""

    trace: Path | None = Field(None, description="folder for trace events in Perfetto's format; unset: no trace")


class CheckpointOptions(Options):
    """Options of a process that loads a checkpoint."""

    model: Path = Field(description="folder of the checkpoint")
    load_format: Literal["auto", "dummy"] = Field("auto", description="dummy: random weights of the checkpoint's shapes")


class ImageLimits(Options):
    """Limits that the gateway and the vision worker both enforce."""

    max_image_pixels: int = Field(64_000_000, ge=1, description="maximum number of pixels of an image")


OptionsT = TypeVar("OptionsT", bound=Options)

_RESERVED = frozenset({"config"})
_POSITIONAL = frozenset({"model", "address"})


def read_options(options: type[OptionsT], arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> OptionsT:
    """The options of one command, from its arguments, the environment and a file. Exits 2 on unknown flags (argparse)."""
    environment = os.environ if environment is None else environment
    flags = {k: v for k, v in vars(_parser(options).parse_args(arguments)).items() if v is not None}
    print_config = flags.pop("print_config", False)
    file = flags.pop("config", None) or environment.get(f"{PREFIX}CONFIG")
    merged = {**_from_file(file, options), **_from_environment(environment, options), **flags}
    try:
        made = options.model_validate({k: _listed(options, k, v) for k, v in merged.items()})
    except ValidationError as error:
        raise ConfigError(_explained(error, options)) from None
    if print_config:
        print(json.dumps(effective_values(made), indent=2))
        raise SystemExit(0)
    return made


def effective_values(options: Options) -> dict[str, Any]:
    """The configuration in force, secrets masked."""
    return options.model_dump(mode="json")


def as_arguments(options: Options, target: type[Options], **changed: Any) -> list[str]:
    """Flags that give a process of kind `target` the values of `options` where both know them, and `changed`.

    Secrets never become flags (every user of a machine may read them in its process list): pass them by variable.
    """
    values = {**{k: v for k, v in options if k in target.model_fields}, **changed}
    flags = [_flag_text(k, v) for k, v in values.items() if k != "model" and v is not None and not isinstance(v, SecretStr)]
    return [*([str(values["model"])] if "model" in target.model_fields else []), *flags]


def _flag_text(name: str, value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value).lower() if isinstance(value, bool) else value
    return f"--{name.replace('_', '-')}={text}"


def _parser(options: type[Options]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"dvd {options.command}", description=options.__doc__, allow_abbrev=False,
        epilog=f"Each option is also a variable ({PREFIX}PORT) and a key of the file that --config names (port).",
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE.yaml", help="file of options")
    parser.add_argument("--print-config", action="store_true", help="print the configuration in force and exit")
    for name, field in options.model_fields.items():
        default = "" if field.default in (PydanticUndefined, None) else f" (default: {field.default})"
        text = f"{field.description}{default}".replace("%", "%%")
        if name in _POSITIONAL:
            parser.add_argument(name, nargs="?", metavar=name.upper(), help=text)
        elif field.annotation is bool:
            parser.add_argument(_flag(name), nargs="?", const="true", metavar="true|false", help=text)
        else:
            choices = typing.get_args(field.annotation) if typing.get_origin(field.annotation) is Literal else None
            metavar = "|".join(map(str, choices)) if choices else _kind(field.annotation)
            parser.add_argument(_flag(name), metavar=metavar, help=text)
    return parser


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def flag_name(name: str) -> str:
    """An option as a command line has it: its flag, or MODEL where it has none."""
    return name.upper() if name in _POSITIONAL else _flag(name)


def _kind(annotation: Any) -> str:
    if isinstance(annotation, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    return {int: "N", float: "NUMBER"}.get(annotation, "VALUE")


def _from_environment(environment: Mapping[str, str], options: type[Options]) -> dict[str, str]:
    found = {}
    for variable, value in environment.items():
        name = variable.removeprefix(PREFIX).lower()
        if not variable.startswith(PREFIX) or name in _RESERVED:
            continue
        _refuse_unknown(name, f"variable {variable}", upper=True)
        if name in options.model_fields:
            found[name] = value
    return found


def _from_file(path: str | None, options: type[Options]) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read --config {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must be a mapping of options, e.g. 'port: 8000'")
    for name in content:
        _refuse_unknown(str(name), f"key {str(name)!r} in {path}")
    return {k: v for k, v in content.items() if k in options.model_fields}


def _refuse_unknown(name: str, where: str, upper: bool = False) -> None:
    if name in KNOWN_NAMES:
        return
    near = difflib.get_close_matches(name, KNOWN_NAMES, n=1)
    suggestion = near and (PREFIX + near[0].upper() if upper else near[0])
    hint = f"did you mean {suggestion}?" if suggestion else "see --help for the options"
    raise ConfigError(f"unknown {where}: {hint}")


def _listed(options: type[Options], name: str, value: Any) -> Any:
    """Lists come comma-separated from flags and variables."""
    if typing.get_origin(options.model_fields[name].annotation) is list and isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _explained(error: ValidationError, options: type[Options]) -> str:
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0])
    if first["type"] == "missing":
        given = flag_name(name) if name in _POSITIONAL else f"{flag_name(name)} (or {PREFIX}{name.upper()})"
        return f"missing {given}: {options.model_fields[name].description}"
    secret = "secret" if name == "api_key" else repr(first["input"])
    return f"{flag_name(name)} = {secret}: {first['msg'].lower()} ({options.model_fields[name].description})"

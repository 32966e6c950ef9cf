"""Options of the commands: a flag, a `DVD_*` variable or a key of `--config FILE.yaml`, in that order of precedence.

This module has the machinery, and the options that several processes share. The options of one process are in the `config.py`
of its package. One file may serve all commands: a key of another command is ignored, an unknown key is an error. Options are
read once, frozen, and passed down.
"""

import argparse
import contextlib
import difflib
import json
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError, PydanticUndefined

from common import logs, secrets
from common.service_links import is_service_link

PREFIX = "DVD_"

ADDRESS_PATTERN = r"unix:/.+|[^:/]+:\d+|\[[0-9a-fA-F:]+\]:\d+"


def _check_address(text: str) -> str:
    if not re.fullmatch(ADDRESS_PATTERN, text):
        raise PydanticCustomError("address", "expected HOST:PORT, [IPV6]:PORT or unix:/PATH")
    return text


Address = Annotated[str, AfterValidator(_check_address)]
"""Address to listen on."""


def _keep_explicit_path(value: object) -> object:
    """Make `./ORG/NAME` absolute: as a `Path` it would lose its dot, and so be the id of a repository."""
    return os.path.abspath(value) if isinstance(value, str) and value.startswith(("./", "../")) else value


Model = Annotated[Path, BeforeValidator(_keep_explicit_path)]
"""What names a checkpoint."""
MODEL_DESCRIPTION = "folder of the checkpoint, or ORG/NAME[@REVISION] on Hugging Face's hub"

KNOWN_NAMES = frozenset({
    "address", "admin", "allow_private_images", "allow_vir", "api_key", "cache", "cluster_token", "cluster_token_file",
    "compiled_tools", "cors_origins", "decode_memory", "decode_timeout", "degrade_after", "degrade_threshold", "degrade_tiles",
    "delivery_port", "device", "docs", "early_prefill", "embedding_dtype", "fetch_timeout", "fetch_user_agent", "head_timeout",
    "hedge_share", "host", "http", "insecure", "keep_alive_timeout", "language_workers", "listen", "load_format", "log_format",
    "log_level", "max_batch_tiles", "max_bodies_bytes", "max_body_bytes", "max_connections", "max_image_bytes",
    "max_image_pixels", "max_images", "max_in_flight", "max_json_values", "max_output_tokens", "max_prompt_characters",
    "max_queue_seconds", "max_sequences", "max_tiles", "max_video_bytes", "metrics_port", "min_body_rate", "model",
    "partial_prefill_share", "port", "prepare_threads", "progress_timeout", "request_timeout", "retry_share", "router_scope",
    "shutdown_delay", "shutdown_grace", "sink_bytes", "sink_lease", "spare", "stream_keep_alive", "timeout", "tls_ca",
    "tls_cert", "tls_key", "tls_name", "trace", "trusted_proxies", "vir", "vir_absolute_threshold", "vir_relative_threshold",
    "vision_backend", "vision_compile", "vision_dtype", "vision_workers", "vllm", "wait", "wait_for_embeddings", "workers",
})  # fmt: skip
"""Names of the options of all commands. A process must recognise those of others, whose packages it may not have."""


class ConfigError(Exception):
    """An option is unknown or has an invalid value. The message is one line and names the option."""


class Options(BaseModel):
    """Options of every command."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    command: ClassVar[str]
    """The command's name: `dvd COMMAND`."""
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="minimum severity of log records")
    log_format: Literal["text", "json"] = Field("text", description="text for people, or one JSON object a line")

    @classmethod
    def hint_for_flag(cls, flag: str) -> str:
        """Return what to write instead of an unknown flag."""
        flags = [_flag(name) for name in cls.model_fields if name not in _POSITIONAL]
        near = difflib.get_close_matches(flag, flags, n=1, cutoff=0.75)
        return f"did you mean {near[0]}?" if near else f"dvd {cls.command} --help lists the flags"


class MetricsOptions(Options):
    """Options of a process that serves Prometheus metrics on a port of their own."""

    metrics_port: int = Field(0, ge=0, le=65535, description="port of the Prometheus endpoint; 0: no endpoint")


class TraceOptions(Options):
    """Options of a process that records a trace."""

    trace: Path | None = Field(None, description="folder for trace events in Perfetto's format; unset: no trace")


class ShutdownOptions(Options):
    """Options of a process that lets running requests end before it exits."""

    shutdown_grace: float = Field(
        30.0, ge=0, description="seconds that running requests have to end after SIGTERM; the rest ends with an error"
    )


class AdminOptions(Options):
    """Options of a process that can be drained through a listener of its own."""

    admin: Address | None = Field(
        None, description="address for dvd drain, HOST:PORT or unix:/PATH; keep it private; unset: none"
    )


class CheckpointOptions(Options):
    """Options of a process that loads a checkpoint."""

    model: Model = Field(description=MODEL_DESCRIPTION)
    load_format: Literal["auto", "dummy"] = Field("auto", description="dummy: random weights of the checkpoint's shapes")


class ImageLimits(Options):
    """Limits that the gateway and the vision worker both enforce."""

    max_image_pixels: int = Field(64_000_000, ge=1, description="maximum number of pixels of an image")
    decode_timeout: float = Field(
        20.0,
        ge=1,
        description="CPU time in seconds to decode a video, or an image of --max-image-pixels; smaller ones get less",
    )
    decode_memory: int = Field(
        2 << 30, ge=64 << 20, description="memory in bytes to decode an image or video in; about 30 per pixel are needed"
    )


OptionsT = TypeVar("OptionsT", bound=Options)

_RESERVED = frozenset({"config"})
_POSITIONAL = frozenset({"model", "address"})


def read_options(options: type[OptionsT], arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> OptionsT:
    """Return the options of one command. Prints and exits with status 0 on --help and --print-config.

    Args:
        options: options class of the command.
        arguments: command line after `dvd COMMAND`.
        environment: variables; None: those of this process.

    Raises:
        ConfigError: an option is unknown, missing or has an invalid value, or the file cannot be read.
    """
    environment = os.environ if environment is None else environment
    flags = _from_flags(arguments, options)
    print_config = flags.pop("print_config", False)
    file = flags.pop("config", None) or environment.get(f"{PREFIX}CONFIG")
    merged = {**_from_file(file, options), **_from_environment(environment, options), **flags}
    try:
        result = options.model_validate({k: _split_list(options, k, v) for k, v in merged.items()})
    except ValidationError as error:
        raise ConfigError(_describe_error(error, options)) from None
    if print_config:
        print(json.dumps(effective_values(result), indent=2))
        raise SystemExit(0)
    _log_service_links(environment, result)
    return result


def logging_options(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Options:
    """Return how a command logs, before its options are read, or although they are invalid. Never fails.

    Args:
        arguments: command line after `dvd COMMAND`, of any command.
        environment: variables; None: those of this process.
    """
    environment = os.environ if environment is None else environment
    names = ("log_level", "log_format")
    flags = _logging_flags(arguments)
    file = flags.get("config") or environment.get(f"{PREFIX}CONFIG")
    content: dict[str, Any] = {}
    with contextlib.suppress(ConfigError):
        content = _read_file(file) if file else {}
    sources = (content, {name: environment.get(PREFIX + name.upper()) for name in names}, flags)
    merged = {name: source[name] for source in sources for name in names if source.get(name) is not None}
    try:
        return Options.model_validate(merged)
    except ValidationError:
        return Options()


def _logging_flags(arguments: Sequence[str]) -> dict[str, Any]:
    parser = _Parser(prog="dvd", add_help=False, allow_abbrev=False)
    for flag in ("--config", "--log-level", "--log-format"):
        parser.add_argument(flag)
    own = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    with contextlib.suppress(ConfigError):
        return vars(parser.parse_known_args(own)[0])
    return {}


def effective_values(options: Options) -> dict[str, Any]:
    """Return the values in force as JSON, secrets masked."""
    values: dict[str, Any] = secrets.redact(options.model_dump(mode="json"))
    return values


def as_arguments(options: Options, target: type[Options], **changed: Any) -> list[str]:
    """Return the arguments that give another process the values of the options that both have.

    Secrets never become arguments, which every user of the machine can read in the process list: `secret_variables` has them.

    Args:
        options: options of this process.
        target: options class of the other process.
        changed: values that replace or complete those of `options`.
    """
    values = _shared_values(options, target, changed)
    flags = [_flag_with_value(k, v) for k, v in values.items() if k != "model" and v is not None and not secrets.is_secret(v)]
    return [*([str(values["model"])] if "model" in target.model_fields else []), *flags]


def secret_variables(options: Options, target: type[Options], **changed: Any) -> dict[str, str]:
    """Return the variables that give another process the secrets that `as_arguments` leaves out. Same arguments."""
    values = _shared_values(options, target, changed)
    return {PREFIX + k.upper(): secrets.reveal(v) for k, v in values.items() if secrets.is_secret(v)}


def secret_names(options: type[Options]) -> list[str]:
    """Return the names of the options whose value is always a secret."""
    return [name for name, field in options.model_fields.items() if _is_secret_field(field)]


def _is_secret_field(field: FieldInfo) -> bool:
    return SecretStr in (field.annotation, *typing.get_args(field.annotation))


def _shared_values(options: Options, target: type[Options], changed: Mapping[str, Any]) -> dict[str, Any]:
    return {**{k: v for k, v in options if k in target.model_fields}, **changed}


def flag_name(name: str) -> str:
    """Return an option as the command line has it: its flag, or its name in capitals if it is positional."""
    return name.upper() if name in _POSITIONAL else _flag(name)


def default_text(field: FieldInfo) -> str | None:
    """Return an option's default as a user writes it, or None if it has none."""
    if field.default is PydanticUndefined or field.default in (None, []):
        return None
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _flag_with_value(name: str, value: Any) -> str:
    return f"{_flag(name)}={_flag_value(value)}"


def _flag_value(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, dict):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line each."""

    def error(self, message: str) -> NoReturn:
        """Raise `ConfigError` instead of printing the usage and exiting."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def _parser(options: type[Options]) -> _Parser:
    parser = _Parser(
        prog=f"dvd {options.command}", description=options.__doc__, allow_abbrev=False,
        epilog=f"Each option --some-name can also be set by the variable {PREFIX}SOME_NAME, or by the key some_name in the "
        f"file that --config or {PREFIX}CONFIG names. A flag overrides a variable, a variable overrides the file.",
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE.yaml", help="file of options; keys of other commands are ignored")
    parser.add_argument(
        "--print-config", action="store_true", help="print the configuration in force and exit; secrets are masked"
    )
    for name, field in options.model_fields.items():
        default = default_text(field)
        text = f"{field.description}{f' (default: {default})' if default else ''}".replace("%", "%%")
        if name in _POSITIONAL:
            parser.add_argument(name, nargs="?", metavar=name.upper(), help=text)
        elif field.annotation is bool:
            parser.add_argument(_flag(name), nargs="?", const="true", metavar="true|false", help=text)
        else:
            parser.add_argument(_flag(name), metavar=_metavar(field.annotation), help=text)
    return parser


def _metavar(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return "|".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) in (list, dict):
        return "LIST" if typing.get_origin(annotation) is list else "JSON"
    if isinstance(annotation, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    return {int: "N", float: "NUMBER", Path: "PATH"}.get(annotation, "VALUE")


def _from_flags(arguments: Sequence[str], options: type[Options]) -> dict[str, Any]:
    parsed, unknown = _parser(options).parse_known_args(arguments)
    if unknown:
        raise ConfigError(_describe_unknown_argument(unknown[0], options))
    return {k: v for k, v in vars(parsed).items() if v is not None}


def _describe_unknown_argument(argument: str, options: type[Options]) -> str:
    if not argument.startswith("-"):
        return f"unexpected argument {argument!r}; see dvd {options.command} --help"
    flag = argument.split("=")[0]
    return f"unknown flag {flag}: {options.hint_for_flag(flag)}"


def _from_environment(environment: Mapping[str, str], options: type[Options]) -> dict[str, str]:
    values = {}
    for variable, value in environment.items():
        name = variable.removeprefix(PREFIX).lower()
        if not variable.startswith(PREFIX) or name in _RESERVED or is_service_link(variable, value):
            continue
        _check_known(name, f"variable {variable}", upper=True)
        if name in options.model_fields:
            values[name] = value.strip()  # a secret that was made from a file ends with a newline
    return values


def _log_service_links(environment: Mapping[str, str], options: Options) -> None:
    """Print the variables that Kubernetes has set for services, if the log level asks for it: no logger is configured yet."""
    links = sorted(name for name, value in environment.items() if name.startswith(PREFIX) and is_service_link(name, value))
    if links and options.log_level == "debug":
        text = f"ignored variables that describe services of Kubernetes: {', '.join(links)}"
        logs.print_line(f"dvd {options.command}", text, options.log_format, "debug")


def _from_file(path: str | None, options: type[Options]) -> dict[str, Any]:
    if path is None:
        return {}
    content = _read_file(path)
    for name in content:
        _check_known(str(name), f"key {str(name)!r} in {path}")
    return {k: v for k, v in content.items() if k in options.model_fields}


def _read_file(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read --config {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must be a mapping of options, e.g. 'port: 8000'")
    return content


def _check_known(name: str, source: str, upper: bool = False) -> None:
    """Raise `ConfigError` with the nearest known name if no command has an option of this name."""
    if name in KNOWN_NAMES:
        return
    near = difflib.get_close_matches(name, KNOWN_NAMES, n=1)
    suggestion = near and (PREFIX + near[0].upper() if upper else near[0])
    hint = f"did you mean {suggestion}?" if suggestion else "no command has this option; dvd COMMAND --help lists them"
    raise ConfigError(f"unknown {source}: {hint}")


def _split_list(options: type[Options], name: str, value: Any) -> Any:
    """Split a list that comes comma-separated from a flag or a variable."""
    if typing.get_origin(options.model_fields[name].annotation) is list and isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _describe_error(error: ValidationError, options: type[Options]) -> str:
    """Return the first error as one line: the option, its value, what is expected, and the option's description."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0])
    field = options.model_fields[name]
    if first["type"] == "missing":
        source = flag_name(name) if name in _POSITIONAL else f"{flag_name(name)} (or {PREFIX}{name.upper()})"
        return f"missing {source}: {field.description}"
    value = "(secret)" if _is_secret_field(field) else secrets.redact_url(repr(first["input"]))
    description = "" if first["type"] == "address" else f" ({field.description})"  # an address error lists the forms
    return f"{flag_name(name)} = {value}: {_expectation(first)}{description}"


_EXPECTATIONS = {
    "int_parsing": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_parsing": "expected a number",
    "bool_parsing": "expected true or false",
    "finite_number": "expected a finite number",
    "greater_than": "expected more than {gt:g}",
    "greater_than_equal": "expected at least {ge:g}",
    "less_than_equal": "expected at most {le:g}",
    "literal_error": "expected {expected}",
    "too_short": "expected at least {min_length} value",
    "string_pattern_mismatch": "invalid format",
}
"""Expectations by type of pydantic's error, whose own messages are about inputs, strings and patterns."""


def _expectation(error: ErrorDetails) -> str:
    text = _EXPECTATIONS.get(error["type"])
    return text.format(**error.get("ctx", {})) if text else error["msg"]

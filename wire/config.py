"""Every option of every command: a flag, a `DVD_*` variable and a key of `--config FILE.yaml`, in that order of precedence.

One file may serve all commands: a key that only another command knows is passed over, one that nobody knows is an error.
Configuration is read once, here, frozen, and handed down.
"""

import argparse
import difflib
import json
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError, PydanticUndefined

from wire.tiling import MOST_TILES

PREFIX = "DVD_"

_ADDRESS = r"unix:/.+|[^:/]+:\d+|\[[0-9a-fA-F:]+\]:\d+"
Address = Annotated[str, Field(pattern=rf"^({_ADDRESS})$")]
_NAME = re.compile(r"dns:[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?:\d+")


def _worker_address(text: str) -> str:
    """A static address, or a name that stands for a worker at each of its addresses."""
    found = _NAME.fullmatch(text) or re.fullmatch(_ADDRESS, text)
    port = text.rpartition(":")[2]
    if not found or not (text.startswith("unix:") or 0 < int(port) < 1 << 16):
        raise PydanticCustomError("address", "expected HOST:PORT, [IPV6]:PORT, unix:/PATH, or dns:NAME:PORT for all of a name")
    return text


def _health_address(text: str) -> str:
    if not re.fullmatch(rf"{_ADDRESS}|http://[^/\s]+/\S+", text):
        raise PydanticCustomError("address", "expected HOST:PORT, [IPV6]:PORT, unix:/PATH, or http://HOST:PORT/health/ready")
    return text


WorkerAddress = Annotated[str, AfterValidator(_worker_address)]
CacheUrl = Annotated[str, Field(pattern=r"^(none|memory://(\?bytes=[1-9]\d*)?|rediss?://.+|unix:///.+)$")]
LoadFormat = Literal["auto", "dummy"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]


class ConfigError(Exception):
    """An option that is unknown or has a bad value; the message is one line and names it."""


class Options(BaseModel):
    """What every command takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="how much to log, on stderr")
    log_format: Literal["text", "json"] = Field("text", description="how to log: for people, or one JSON object a line")


class Metered(Options):
    """What is counted in a process that serves no HTTP of its own."""

    metrics_port: int = Field(0, ge=0, le=65535, description="port to serve Prometheus metrics on; 0: none")


class Traced(Options):
    """What can be looked at afterwards, stage by stage."""

    trace: Path | None = Field(None, description="folder for events that Perfetto draws; none: no trace")


class Model(Options):
    model: Path = Field(description="folder of the checkpoint")
    load_format: LoadFormat = Field("auto", description="dummy: random weights of the checkpoint's true shapes")


IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""As Pillow names them; the door and the decoder take the same."""


class Limits(Options):
    """What both the door and the decoder hold to."""

    max_image_pixels: int = Field(64_000_000, ge=1, description="pixels of one image")


class Serving(Limits, Traced):
    """The gateway's door and its limits."""

    host: str = Field("127.0.0.1", description="address the gateway listens on")
    port: int = Field(8000, ge=0, le=65535, description="port the gateway listens on")
    api_key: SecretStr | None = Field(None, description="bearer token that callers must send; none: open door")
    allow_private_images: bool = Field(
        False, description="fetch images over http and from private addresses too: only where every caller is trusted"
    )
    max_images: int = Field(32, ge=1, description="images in one request, each frame of a video being one")
    max_image_bytes: int = Field(32 << 20, ge=1, description="bytes of one encoded image")
    max_video_bytes: int = Field(64 << 20, ge=1, description="bytes of one video")
    max_body_bytes: int = Field(128 << 20, ge=1, description="bytes of one request's body")
    max_in_flight: int = Field(512, ge=1, description="requests at once; one more is answered 429")
    workers: int = Field(1, ge=1, le=64, description="processes of the gateway, which share its port and its limit")
    fetch_timeout: float = Field(20.0, gt=0, description="seconds to fetch one image or video; and to decode a video")
    request_timeout: float = Field(600.0, gt=0, description="seconds until a request is given up (504)")
    stream_keep_alive: float = Field(
        15.0, ge=0, description="seconds of silence in a stream until a comment says that it lives; 0: never"
    )
    router_scope: Literal["image", "request"] = Field(
        "image", description="tiles over which the router's quantile runs; request: as the official code does"
    )
    vir: Literal["auto", "off", "all"] = Field(
        "auto", description="tiles to compress where a request does not say: those the router chooses, none, every one"
    )
    vir_relative_threshold: float | None = Field(
        None, ge=0, le=1, description="quantile of the scores that a compressed tile is above, 0 to 1; none: the checkpoint's"
    )
    vir_absolute_threshold: float | None = Field(
        None, ge=0, le=1, description="score that a compressed tile has at least, 0 to 1; none: the checkpoint's"
    )

    allow_vir: bool = Field(True, description="callers may say what the router does (vir); false: who does gets an error")
    max_tiles: int | None = Field(
        None, ge=1, le=MOST_TILES, description="tiles of one image, at most, thumbnail not counted; none: the checkpoint's own"
    )

    @field_validator("vir", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # what YAML makes of a bare off

    @field_validator("vir_relative_threshold", "vir_absolute_threshold")
    @classmethod
    def _only_auto_has_thresholds(cls, value: float | None, info: ValidationInfo) -> float | None:
        mode = info.data.get("vir", "auto")
        if value is not None and mode != "auto":
            raise PydanticCustomError("threshold", "only for --vir=auto, and it is {mode}: leave one out", {"mode": mode})
        return value


class Gateway(Serving):
    """`dvd gateway`: the HTTP door in front of workers that run elsewhere."""

    vision_workers: list[WorkerAddress] = Field(
        min_length=1,
        description="vision workers, comma-separated: HOST:PORT, unix:/PATH, dns:NAME:PORT for all of a name",
    )
    language_workers: list[WorkerAddress] = Field(
        min_length=1, description="language workers' sinks, comma-separated, in the same forms"
    )


class Encoding(Limits, Traced):
    """How a vision worker computes."""

    vision_dtype: Dtype = Field("auto", description="dtype the vision tower computes in; auto: the checkpoint's")
    vision_backend: Literal["internvl", "fake"] = Field(
        "internvl", description="fake: embeddings from a hash of the image, to price everything but the tower"
    )
    max_batch_tiles: int = Field(0, ge=0, description="tiles in one forward pass; 0: 4 on a CPU, 32 on a GPU")
    vision_compile: bool = Field(
        False,
        description="compile the tower, into CUDA graphs: for a GPU (on a CPU it is slower than without). A slower start, and "
        "a C++ compiler is needed",
    )
    prepare_threads: int = Field(0, ge=0, description="threads that decode and cut images; 0: one a core")


class Vision(Model, Encoding, Metered):
    """`dvd vision MODEL`: one vision worker."""

    cache: CacheUrl = Field(
        "memory://", description="embeddings already made: none, memory:// (?bytes=N) of this worker, redis://HOST:PORT/0"
    )

    listen: Address = Field("127.0.0.1:50051", description="address to serve gRPC on")
    device: str = Field("auto", description="cpu, cuda, cuda:1, …; auto: a GPU if there is one")


class Storing(Options):
    """How a language worker keeps embeddings until vLLM has read them."""

    sink_bytes: int = Field(
        0, ge=0, description="shared memory for embeddings; 0: a quarter of what /dev/shm has free, at most 8 GiB"
    )
    sink_lease: float = Field(
        60.0, gt=0, description="seconds a delivered or asked-for embedding that was not read yet is safe from eviction"
    )
    wait_for_embeddings: float = Field(
        10.0, gt=0, description="seconds a request waits in vLLM for an embedding that has not come yet"
    )


class Language(Model, Storing, Metered):
    """`dvd language MODEL [-- vllm serve flags]`: one language worker, vLLM's server and the sink beside it."""

    listen: Address = Field("127.0.0.1:50052", description="address of the sink's gRPC")
    http: Address = Field("127.0.0.1:8001", description="address of vLLM's own server: keep it private")


class Up(Model, Serving, Encoding, Storing):
    """`dvd up MODEL [-- vllm serve flags]`: all processes of one machine."""

    cache: CacheUrl | Literal["redis"] = Field(
        "memory://", description="embeddings already made: none, memory:// of each vision worker, redis: one is started, a URL"
    )
    metrics_port: int = Field(
        0, ge=0, le=65535, description="port to serve the first worker's Prometheus metrics on, then one for each; 0: none"
    )
    vision_workers: int = Field(1, ge=1, description="vision workers to run")
    language_workers: int = Field(1, ge=1, description="language workers to run")


class Describe(Options):
    """`dvd describe MODEL`: what a checkpoint is, as JSON."""

    model: Path = Field(description="folder of the checkpoint")


class Health(Options):
    """`dvd health ADDRESS`: exits 0 where what listens there can do its work, 1 where not."""

    address: Annotated[str, AfterValidator(_health_address)] = Field(
        description="a worker (HOST:PORT, unix:/PATH), or a gateway's http://HOST:PORT/health/ready or /health/live"
    )
    timeout: float = Field(5.0, gt=0, description="seconds until no answer is a bad one")


OptionsT = TypeVar("OptionsT", bound=Options)

COMMANDS: dict[str, type[Options]] = {
    "up": Up,
    "gateway": Gateway,
    "vision": Vision,
    "language": Language,
    "describe": Describe,
    "health": Health,
}
_KNOWN = frozenset(name for options in COMMANDS.values() for name in options.model_fields)
_RESERVED = frozenset({"config"})
_POSITIONAL = frozenset({"model", "address"})


def read(options: type[OptionsT], arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> OptionsT:
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
        print(json.dumps(effective(made), indent=2))
        raise SystemExit(0)
    return made


def effective(options: Options) -> dict[str, Any]:
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
    command = next((name for name, known in COMMANDS.items() if known is options), options.__name__.lower())
    parser = argparse.ArgumentParser(
        prog=f"dvd {command}", description=options.__doc__, allow_abbrev=False,
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


def shown(name: str) -> str:
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
    if name in _KNOWN:
        return
    near = difflib.get_close_matches(name, _KNOWN, n=1)
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
        given = shown(name) if name in _POSITIONAL else f"{shown(name)} (or {PREFIX}{name.upper()})"
        return f"missing {given}: {options.model_fields[name].description}"
    secret = "secret" if name == "api_key" else repr(first["input"])
    return f"{shown(name)} = {secret}: {first['msg'].lower()} ({options.model_fields[name].description})"

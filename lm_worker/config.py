"""Options of a language worker, and how they share a command line with the flags of `vllm serve`."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from common.options import Address, AdminOptions, CheckpointOptions, ConfigError, MetricsOptions, Options, ShutdownOptions
from common.security import ProcessOptions
from lm_worker import vllm_flags

_OWN_FLAGS = ("--host", "--port", "--uds", "--model", "--ec-transfer-config", "--ec-manager-config", "--enable-mm-embeds",
              "--limit-mm-per-prompt")  # fmt: skip
_TLS_FLAGS = ("--ssl-keyfile", "--ssl-certfile", "--ssl-ca-certs", "--ssl-cert-reqs", "--enable-ssl-refresh")
_LOGGING_FLAGS = ("--log-level", "--log-config-file", "--logging-config")


def _parse_mapping(value: Any) -> Any:
    """Return what a flag or variable has as text, and a file as a mapping already."""
    try:
        parsed = yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        parsed = None
    if not isinstance(parsed, Mapping) or not all(isinstance(name, str) for name in parsed):
        raise PydanticCustomError("mapping", 'expected a mapping of flags of vllm serve, e.g. {"max_model_len": 4096}')
    return dict(parsed)


class VllmOptions(Options):
    """Options of a command that passes flags on to `vllm serve`."""

    vllm: Annotated[dict[str, Any], BeforeValidator(_parse_mapping)] = Field(
        {}, description="flags of vllm serve as a mapping, for the file of --config; flags after -- override them"
    )

    @classmethod
    def hint_for_flag(cls, flag: str) -> str:
        """Return where a flag of vLLM belongs, or what to write instead of an unknown flag."""
        if vllm_flags.normalize(flag) in vllm_flags.known():
            return f"vLLM's flags go after --, as in dvd {cls.command} MODEL -- {flag} …"
        hint = super().hint_for_flag(flag)
        return hint if hint.endswith("?") else f"{hint}, and vLLM's flags go after --"


class SinkStoreOptions(Options):
    """Options of a language worker that `dvd up` has too: storage of embeddings until vLLM has read them."""

    sink_bytes: int = Field(
        0, ge=0, description="shared memory for embeddings in bytes; 0: a quarter of the free part of /dev/shm, at most 8 GiB"
    )
    embedding_dtype: Literal["auto", "int8", "fp8"] = Field(
        "auto",
        description="dtype of embeddings until vLLM reads them; int8, fp8: narrow, with a scale per visual token; "
        "auto: the language model's",
    )
    sink_lease: float = Field(
        60.0, gt=0, description="seconds during which a delivered or requested embedding is not evicted before vLLM read it"
    )
    wait_for_embeddings: float = Field(
        10.0, gt=0, description="seconds a request waits in vLLM for a missing embedding that no vision worker is to deliver"
    )
    partial_prefill_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="largest share of the KV cache, and of vLLM's --max-num-seqs, that requests hold which are prefilled "
        "while an image is missing; 0: none",
    )


class ProgressOptions(Options):
    """Options of a language worker that `dvd up` has too: when an engine that makes no progress counts as unhealthy."""

    progress_timeout: float = Field(
        60.0, ge=0, description="seconds without a token, although requests run, until vLLM counts as unhealthy; 0: never"
    )


class LanguageOptions(
    CheckpointOptions,
    SinkStoreOptions,
    ProgressOptions,
    ShutdownOptions,
    AdminOptions,
    VllmOptions,
    MetricsOptions,
    ProcessOptions,
):
    """`dvd language MODEL [-- vllm serve flags]`: one language worker: vLLM's server and the sink."""

    command: ClassVar[str] = "language"

    listen: Address = Field("127.0.0.1:50052", description="address of the sink's gRPC server")
    http: Address = Field("127.0.0.1:8001", description="address of vLLM's HTTP server: keep it private")
    delivery_port: int = Field(
        0,
        ge=-1,
        le=65_535,
        description="TCP port beside --listen on which embeddings arrive, unless there is TLS; 0: a free "
        "one; -1: none, they arrive through gRPC",
    )
    device: str = Field("auto", description="cuda: fail where vLLM finds no GPU; cpu, auto: what vLLM is built for")


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The language worker's own arguments, and those after `--`, which are flags of `vllm serve`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return list(arguments[:end]), list(arguments[end + 1 :])


def all_vllm_flags(options: VllmOptions, flags: Sequence[str]) -> list[str]:
    """Return the flags of the file and then those of the command line, which override them.

    Args:
        options: options with `vllm`.
        flags: the arguments after `--`.

    Raises:
        ConfigError: a flag is unknown, or one that the language worker sets itself.
    """
    result = [*_flags_of_mapping(options.vllm), *flags]
    reject_own_flags(result)
    unknown = vllm_flags.first_unknown(result)
    if unknown is not None:
        raise ConfigError(_describe_unknown(unknown, type(options)))
    return result


def reject_own_flags(flags: Sequence[str]) -> None:
    """Raise `ConfigError` if a flag after `--` is one that the language worker sets itself."""
    for flag in flags:
        name = flag.split("=")[0]
        if (normal := vllm_flags.normalize(flag)) in _OWN_FLAGS:
            raise ConfigError(f"{name} after -- is set by the language worker itself; remove it.")
        if normal == "--shutdown-timeout":
            raise ConfigError(f"{name} after -- is replaced by --shutdown-grace, which goes before --")
        if normal in ("-h", "--help"):
            raise ConfigError(f"{name} after --: vllm serve --help=all lists vLLM's flags")
        if normal in _TLS_FLAGS:
            raise ConfigError(f"{name} after -- is set by the language worker itself; use --tls-cert, --tls-key and --tls-ca")
        if normal in _LOGGING_FLAGS:
            raise ConfigError(f"{name} after -- is set by the language worker itself; use --log-level and --log-format")


def _describe_unknown(flag: str, options: type[Options]) -> str:
    """Return what is wrong with a flag after `--`: it is misspelled, or belongs before `--`."""
    if flag.removeprefix("--").replace("-", "_") in options.model_fields:
        return f"{flag} after -- is no flag of vLLM but of dvd {options.command}: give it before --"
    near = vllm_flags.nearest(flag)
    hint = f"did you mean {near}?" if near else "vllm serve --help=all lists them"
    return f"unknown flag {flag} after --, where vLLM's flags go: {hint}"


def _flags_of_mapping(values: Mapping[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in _flag_words(f"--{name.replace('_', '-')}", value)]


def _flag_words(flag: str, value: Any) -> list[str]:
    """Return a flag with its value as `vllm serve` expects them; null leaves the flag out."""
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag.removeprefix('--')}"]
    if isinstance(value, Mapping):
        return [f"{flag}={json.dumps(value)}"]
    if isinstance(value, list):
        return [flag, *map(str, value)] if vllm_flags.takes_several(flag) else [f"{flag}={json.dumps(value)}"]
    return [f"{flag}={value}"]

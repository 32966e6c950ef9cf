"""Options of a language worker, and how they share a command line with the flags of `vllm serve`."""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from common.options import Address, CheckpointOptions, ConfigError, MetricsOptions, Options

_OWN_FLAGS = ("--host", "--port", "--uds", "--model", "--ec-transfer-config", "--enable-mm-embeds", "--limit-mm-per-prompt")


class SinkStoreOptions(Options):
    """Options of a language worker that `dvd up` has too: storage of embeddings until vLLM has read them."""

    sink_bytes: int = Field(
        0, ge=0, description="shared memory for embeddings in bytes; 0: a quarter of the free part of /dev/shm, at most 8 GiB"
    )
    sink_lease: float = Field(
        60.0, gt=0, description="seconds during which a delivered or requested embedding is not evicted before vLLM read it"
    )
    wait_for_embeddings: float = Field(
        10.0, gt=0, description="seconds a request waits in vLLM for an embedding that has not arrived"
    )


class LanguageOptions(CheckpointOptions, SinkStoreOptions, MetricsOptions):
    """`dvd language MODEL [-- vllm serve flags]`: one language worker: vLLM's server and the sink."""

    command: ClassVar[str] = "language"
    forwards_vllm_flags: ClassVar[bool] = True

    listen: Address = Field("127.0.0.1:50052", description="address of the sink's gRPC server")
    http: Address = Field("127.0.0.1:8001", description="address of vLLM's HTTP server: keep it private")


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The language worker's own arguments, and those after `--`, which are flags of `vllm serve`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return list(arguments[:end]), list(arguments[end + 1 :])


def reject_own_flags(vllm_flags: Sequence[str]) -> None:
    """Raise `ConfigError` if a flag after `--` is one that the language worker sets itself."""
    for flag in vllm_flags:
        name = flag.split("=")[0]
        if name.replace("_", "-") in _OWN_FLAGS:
            raise ConfigError(f"{name} after -- is set by the language worker itself; remove it.")

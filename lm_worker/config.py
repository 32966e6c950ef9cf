"""Options of a language worker."""

from typing import ClassVar

from pydantic import Field

from common.options import Address, CheckpointOptions, MetricsOptions, Options


class SinkStoreOptions(Options):
    """Options of a language worker that `dvd up` has too: how it stores embeddings until vLLM has read them."""

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
    """`dvd language MODEL [-- vllm serve flags]`: one language worker, which is vLLM's server and the sink beside it."""

    command: ClassVar[str] = "language"
    forwards_vllm_flags: ClassVar[bool] = True

    listen: Address = Field("127.0.0.1:50052", description="address of the sink's gRPC server")
    http: Address = Field("127.0.0.1:8001", description="address of vLLM's HTTP server: keep it private")

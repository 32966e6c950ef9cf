"""Options of `dvd up`: its own, and those of the processes that it starts."""

from typing import ClassVar, Literal

from pydantic import Field

from common.options import CheckpointOptions
from lm_worker.config import ProgressOptions, SinkStoreOptions, VllmOptions
from server.config import ServingOptions
from vision_worker.config import CacheUrl, EncodingOptions


class UpOptions(CheckpointOptions, ServingOptions, EncodingOptions, SinkStoreOptions, ProgressOptions, VllmOptions):
    """`dvd up MODEL [-- vllm serve flags]`: all processes of one machine."""

    command: ClassVar[str] = "up"

    cache: CacheUrl | Literal["redis"] = Field(
        "memory://",
        description="cache of embeddings: none, memory:// in each vision worker, redis (starts one), or a redis:// URL",
    )
    metrics_port: int = Field(
        0, ge=0, le=65535, description="Prometheus port of the first worker; each further worker has the next one; 0: none"
    )
    vision_workers: int = Field(1, ge=1, description="number of vision workers")
    language_workers: int = Field(1, ge=1, description="number of language workers")

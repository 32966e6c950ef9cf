"""Options of a vision worker."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from common.options import Address, AdminOptions, CheckpointOptions, ImageLimits, MetricsOptions, ShutdownOptions, TraceOptions
from common.security import ProcessOptions

CacheUrl = Annotated[str, Field(pattern=r"^(none|memory://(\?bytes=[1-9]\d*)?|rediss?://.+|unix:///.+)$")]


class EncodingOptions(ImageLimits, TraceOptions):
    """Options of a vision worker that `dvd up` has too: the computation of embeddings."""

    vision_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="dtype of the vision tower; auto: the checkpoint's"
    )
    vision_backend: Literal["internvl", "fake"] = Field(  # the names of `encoder.FAMILIES`
        "internvl", description="fake: embeddings derived from a hash of the image, to measure everything but the tower"
    )
    max_batch_tiles: int = Field(0, ge=0, description="maximum number of tiles in a forward pass; 0: 1 on a CPU, 32 on a GPU")
    vision_compile: bool = Field(
        False,
        description="compile the tower (slower on a CPU); needs a C++ compiler",
    )
    prepare_threads: int = Field(0, ge=0, description="threads that decode and tile images; 0: one per core")


class VisionOptions(CheckpointOptions, EncodingOptions, MetricsOptions, ShutdownOptions, AdminOptions, ProcessOptions):
    """Options of one vision worker, `dvd vision MODEL`."""

    command: ClassVar[str] = "vision"

    cache: CacheUrl = Field(
        "memory://",
        description="cache of embeddings: none, memory:// (?bytes=N) in this process, or redis://HOST:PORT/0",
    )
    listen: Address = Field("127.0.0.1:50051", description="address of the gRPC server")
    device: str = Field("auto", description="cpu, cuda, cuda:1, …; auto: a GPU if there is one")
    spare: bool = Field(
        False,
        description="compute at low priority, in idle time of cores that others use, and get only what others have no room for",
    )
    progress_timeout: float = Field(
        60.0, ge=0, description="seconds after which a batch that is not done counts as stalled; 0: never"
    )

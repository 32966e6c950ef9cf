"""Input of a plan: measured costs of each stage, the requests to serve, and latency limits.

All times are in seconds, all sizes in bytes. The fields are the keys of a file for `dvd plan`.
"""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class VisionCosts(_Part):
    """Costs of one vision worker. A batch of n tiles takes `batch + n × tile`."""

    prepare: Positive = Field(description="decoding, resizing and tiling, per tile, on one core")
    cores: int = Field(default=1, ge=1, description="cores that prepare images")
    batch: float = Field(default=0.0, ge=0, description="per batch, independent of its size")
    tile: Positive = Field(description="per tile of a batch")
    batch_tiles: int = Field(default=32, ge=1, description="maximum number of tiles of a batch")
    network: Positive = Field(default=1e9, description="bytes per second that one worker can send")


class LanguageCosts(_Part):
    """Costs of one language worker.

    A step takes `step + decode × running sequences`, `request` for each request that it begins, and the prefill: `prefill` for
    each token, and `attention` for each token before it in its prompt.
    """

    step: float = Field(default=0.0, ge=0, description="per step, independent of its content")
    request: float = Field(default=0.0, ge=0, description="per request, of any length, such as HTTP on the same core")
    prefill: Positive = Field(description="per token of prefill")
    attention: float = Field(default=0.0, ge=0, description="per token of prefill and token before it")
    decode: float = Field(default=0.0, ge=0, description="per running sequence and token")
    step_tokens: int = Field(default=8192, ge=1, description="maximum number of tokens of a step")
    sequences: int = Field(default=256, ge=1, description="maximum number of running sequences")

    def prefill_seconds(self, tokens: int, before: int = 0) -> float:
        """Return the seconds to prefill `tokens` tokens of a prompt, after the first `before` tokens."""
        return tokens * (self.prefill + self.attention * (before + tokens / 2))


class Costs(_Part):
    """Costs of the stages, as `make bench` measures them."""

    vision: VisionCosts
    language: LanguageCosts
    tokens_per_tile: int = Field(default=256, ge=1)
    compressed_tokens_per_tile: int = Field(default=64, ge=1)
    bytes_per_token: int = Field(ge=1, description="of an embedding: width × 2 in bfloat16")


class Kind(_Part):
    """A kind of request. `weight`: its frequency relative to the other kinds."""

    weight: Positive = 1.0
    images: int = Field(default=1, ge=0)
    tiles: int = Field(default=1, ge=1, description="per image, thumbnail included")
    text: int = Field(default=32, ge=1, description="tokens of the prompt without the images")
    output: int = Field(default=64, ge=1, description="tokens of the output")
    repeated: Share = Field(default=0.0, description="share of images whose embedding is stored already")


class Limits(_Part):
    """Limits of the 99th percentiles of latency."""

    ttft: Positive = Field(default=2.0, description="time to first token")
    itl: Positive = Field(default=0.2, description="inter-token latency")


class Load(_Part):
    """The requests to serve."""

    rate: Positive = Field(default=1.0, description="requests per second, arriving at random")
    compressed: Share = Field(default=0.0, description="share of tiles that the router compresses")
    kinds: list[Kind] = Field(default_factory=lambda: [Kind()], min_length=1)
    limits: Limits = Limits()

    @property
    def weight(self) -> float:
        """Sum of the kinds' weights."""
        return sum(kind.weight for kind in self.kinds)


class Fleet(_Part):
    """Numbers of workers. `colocated`: language workers encode images themselves, and there are no vision workers."""

    vision: int = Field(default=1, ge=0)
    language: int = Field(default=1, ge=1)
    deployment: Literal["decoupled", "colocated"] = "decoupled"

    @model_validator(mode="after")
    def _check_vision_workers(self) -> "Fleet":
        if self.deployment == "decoupled" and not self.vision:
            raise ValueError("a decoupled fleet needs at least one vision worker")
        return self


def visual_tokens(costs: Costs, tiles: int, compressed: float) -> int:
    """Return the mean number of visual tokens of `tiles` tiles, of which the share `compressed` is compressed."""
    return math.ceil(tiles * (costs.tokens_per_tile * (1 - compressed) + costs.compressed_tokens_per_tile * compressed))


def work(costs: Costs, load: Load) -> tuple[float, float]:
    """Return the mean device seconds of a request in a vision worker and in a language worker.

    Batches are taken to be full. The simulation adds the effects of queueing and of partial batches.
    """
    vision = language = 0.0
    per_tile = costs.vision.tile + costs.vision.batch / costs.vision.batch_tiles
    for kind in load.kinds:
        tiles = kind.images * kind.tiles
        prompt = kind.text + visual_tokens(costs, tiles, load.compressed)
        share = kind.weight / load.weight
        vision += share * tiles * (1 - kind.repeated) * per_tile
        engine = costs.language
        language += share * (
            engine.request
            + engine.prefill_seconds(prompt)
            + kind.output * (engine.decode + engine.step / engine.sequences)
            + engine.step * prompt / engine.step_tokens
        )
    return vision, language

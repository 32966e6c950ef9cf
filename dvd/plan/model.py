"""What a plan is made from: measured costs of each stage, the requests that come, and what they may wait.

All times in seconds, all sizes in bytes. A file for `dvd plan` has these names as its keys.
"""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class VisionCosts(_Part):
    """One vision worker. A batch of n tiles takes `batch + n × tile`."""

    prepare: Positive = Field(description="decode, resize and cut, a tile, on one core")
    cores: int = Field(default=1, ge=1, description="that prepare")
    batch: float = Field(default=0.0, ge=0, description="of a batch whatever its size")
    tile: Positive = Field(description="of each tile in a batch")
    batch_tiles: int = Field(default=32, ge=1, description="tiles in a batch, at most")
    network: Positive = Field(default=1e9, description="bytes a second that one worker sends")


class LanguageCosts(_Part):
    """One language worker. A step takes `step + reading + decode × sequences that go on`, and `request` for each request that
    it begins; reading is `prefill` for each token, and `attention` for each token that stands before it in its prompt.
    """

    step: float = Field(default=0.0, ge=0, description="of a step whatever is in it")
    request: float = Field(default=0.0, ge=0, description="of a request whatever is in it, HTTP on the same core")
    prefill: Positive = Field(description="a token that is read")
    attention: float = Field(default=0.0, ge=0, description="of a token that is read to one before it")
    decode: float = Field(default=0.0, ge=0, description="a sequence that goes on by one token")
    step_tokens: int = Field(default=8192, ge=1, description="tokens in a step, at most")
    sequences: int = Field(default=256, ge=1, description="sequences at once, at most")

    def reading(self, tokens: int, before: int = 0) -> float:
        """Seconds to read so many tokens of a prompt, as many `before` them having been read."""
        return tokens * (self.prefill + self.attention * (before + tokens / 2))


class Costs(_Part):
    """What the stages cost, as `make bench` measures it."""

    vision: VisionCosts
    language: LanguageCosts
    tokens_per_tile: int = Field(default=256, ge=1)
    compressed_tokens_per_tile: int = Field(default=64, ge=1)
    bytes_per_token: int = Field(ge=1, description="of an embedding: width × 2 in bf16")


class Kind(_Part):
    """A kind of request. `weight`: how often it comes beside the others."""

    weight: Positive = 1.0
    images: int = Field(default=1, ge=0)
    tiles: int = Field(default=1, ge=1, description="of each image, thumbnail counted")
    text: int = Field(default=32, ge=1, description="tokens of the prompt beside the images")
    output: int = Field(default=64, ge=1, description="tokens of the answer")
    repeated: Share = Field(default=0.0, description="share of images whose embedding is there already")


class Limits(_Part):
    """What 99 of 100 requests, and tokens, may wait."""

    ttft: Positive = Field(default=2.0, description="from arrival to the first token")
    itl: Positive = Field(default=0.2, description="between two tokens of an answer")


class Load(_Part):
    """What is to be served."""

    rate: Positive = Field(default=1.0, description="requests a second, arriving at random")
    compressed: Share = Field(default=0.0, description="share of tiles that the router compresses")
    kinds: list[Kind] = Field(default_factory=lambda: [Kind()], min_length=1)
    limits: Limits = Limits()

    @property
    def weight(self) -> float:
        return sum(kind.weight for kind in self.kinds)


class Fleet(_Part):
    """Workers. `colocated`: language workers that encode images themselves, as an engine without vision workers does."""

    vision: int = Field(default=1, ge=0)
    language: int = Field(default=1, ge=1)
    deployment: Literal["decoupled", "colocated"] = "decoupled"

    @model_validator(mode="after")
    def _somebody_sees(self) -> "Fleet":
        if self.deployment == "decoupled" and not self.vision:
            raise ValueError("a decoupled fleet has a vision worker at least")
        return self


def visual_tokens(costs: Costs, tiles: int, compressed: float) -> int:
    """Of so many tiles, on average."""
    return math.ceil(tiles * (costs.tokens_per_tile * (1 - compressed) + costs.compressed_tokens_per_tile * compressed))


def work(costs: Costs, load: Load) -> tuple[float, float]:
    """Device seconds that a request costs on average: V in a vision worker, L in a language worker.

    In full batches: what queueing and half-empty batches add is what the simulation is for.
    """
    vision = language = 0.0
    each = costs.vision.tile + costs.vision.batch / costs.vision.batch_tiles
    for kind in load.kinds:
        tiles = kind.images * kind.tiles
        read = kind.text + visual_tokens(costs, tiles, load.compressed)
        share = kind.weight / load.weight
        vision += share * tiles * (1 - kind.repeated) * each
        engine = costs.language
        language += share * (
            engine.request
            + engine.reading(read)
            + kind.output * (engine.decode + engine.step / engine.sequences)
            + engine.step * read / engine.step_tokens
        )
    return vision, language

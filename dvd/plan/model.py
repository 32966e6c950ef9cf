"""Input of a plan: measured costs of each stage, the requests to serve, and latency limits.

The fields are the keys of a file for `dvd plan`. `docs/planning.md` lists them with their units; a test compares it.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]

_SECONDS = "seconds"


def _key(unit: str, description: str, **constraints: Any) -> Any:
    """Return the field of a key, with its unit."""
    return Field(description=description, json_schema_extra={"unit": unit}, **constraints)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class VisionCosts(_Part):
    """Costs of one vision worker. A batch of n tiles takes `batch + n × tile`."""

    prepare: Positive = _key(_SECONDS, "decoding, resizing and tiling, per tile, on one core")
    cores: int = _key("cores", "cores that prepare images", default=1, ge=1)
    batch: float = _key(_SECONDS, "per batch of the tower, independent of its size", default=0.0, ge=0)
    tile: Positive = _key(_SECONDS, "per tile of a batch: tower, router and projector")
    batch_tiles: int = _key("tiles", "maximum number of tiles of a batch (--max-batch-tiles)", default=32, ge=1)
    network: Positive = _key("bytes/s", "what one worker can send", default=1e9)


class LanguageCosts(_Part):
    """Costs of one language worker.

    A step takes `step + decode × running sequences`, `request` for each request that it begins, and the prefill: `prefill` for
    each token, and `attention` for each token before it in its prompt.
    """

    step: float = _key(_SECONDS, "per step, independent of its content", default=0.0, ge=0)
    request: float = _key(_SECONDS, "per request, of any length, such as HTTP on the same core", default=0.0, ge=0)
    prefill: Positive = _key(_SECONDS, "per token of prefill")
    attention: float = _key(_SECONDS, "per token of prefill and token before it in the prompt", default=0.0, ge=0)
    decode: float = _key(_SECONDS, "per running sequence and token", default=0.0, ge=0)
    step_tokens: int = _key("tokens", "maximum of a step (vLLM's --max-num-batched-tokens)", default=8192, ge=1)
    sequences: int = _key("sequences", "maximum that run at once (vLLM's --max-num-seqs)", default=256, ge=1)

    def prefill_seconds(self, tokens: int, before: int = 0) -> float:
        """Return the seconds to prefill `tokens` tokens of a prompt, after the first `before` tokens."""
        return tokens * (self.prefill + self.attention * (before + tokens / 2))


class Costs(_Part):
    """Costs of the stages, as `dvd plan --from URL` and `make bench` measure them."""

    vision: VisionCosts
    language: LanguageCosts
    tokens_per_tile: int = _key("tokens", "visual tokens of a tile", default=256, ge=1)
    compressed_tokens_per_tile: int = _key("tokens", "visual tokens of a tile that the router compresses", default=64, ge=1)
    bytes_per_token: int = _key("bytes", "of an embedding: width × 2 in bfloat16", ge=1)


class Kind(_Part):
    """A kind of request."""

    weight: Positive = _key("–", "frequency relative to the other kinds", default=1.0)
    images: int = _key("images", "in a request", default=1, ge=0, le=1000)
    tiles: int = _key("tiles", "per image, thumbnail included", default=1, ge=1, le=1000)
    text: int = _key("tokens", "of the prompt without the images", default=32, ge=1, le=10_000_000)
    output: int = _key("tokens", "of the answer", default=64, ge=1, le=100_000)
    repeated: Share = _key("0 to 1", "share of images whose embedding is stored already", default=0.0)


class Limits(_Part):
    """Limits of the 99th percentiles of latency."""

    ttft: Positive = _key(_SECONDS, "time to first token", default=2.0)
    itl: Positive = _key(_SECONDS, "inter-token latency", default=0.2)


class Load(_Part):
    """The requests to serve."""

    rate: Positive = _key("requests/s", "arriving at random", default=1.0)
    compressed: Share = _key("0 to 1", "share of tiles that the router compresses", default=0.0)
    kinds: list[Kind] = Field(default_factory=lambda: [Kind()], min_length=1, description="the mix of requests")
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

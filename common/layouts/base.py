"""The terms in which every layout of checkpoint is described."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Tower:
    """InternViT's dimensions (`vision_config`). `select_layer` counts hidden states from the end, -1 the last."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    image_size: int
    patch_size: int
    norm: str  # "layer_norm" or "rms_norm"
    norm_eps: float
    activation: str
    qkv_bias: bool
    qk_norm: bool
    select_layer: int = -1


@dataclass(frozen=True)
class Thresholds:
    """The router's: a tile is compressed iff its score is above the quantile `relative` and at least `absolute`."""

    relative: float
    absolute: float


@dataclass(frozen=True)
class Description:
    """What `config.json` says, in one vocabulary for all layouts."""

    family: str
    tower: Tower
    language_model: str  # the language model's own architecture, "Qwen3ForCausalLM"
    language_layers: int
    width: int  # the language model's hidden size = width of a visual token
    vocabulary: int
    context: int
    dtype: str
    downsample_ratio: float
    pixel_shuffle: str  # "v1" (the map stays transposed) or "v2"
    min_tiles: int
    max_tiles: int
    thumbnail: bool
    template: str | None
    thresholds: Thresholds | None  # None: no router

    @property
    def tokens_per_tile(self) -> int:
        side = self.tower.image_size // self.tower.patch_size
        return int(side * self.downsample_ratio) ** 2

    @property
    def compressed_tokens_per_tile(self) -> int:
        return self.tokens_per_tile // 4 if self.thresholds else 0


@dataclass(frozen=True)
class Layout:
    """How one layout is read.

    `describe` turns `config.json` (and `preprocessor_config.json`, may be empty) into a `Description`.
    `vision_prefixes` begin the names of the tensors a vision worker needs; `vision_name` turns such a name into
    OpenGVLab's own, plus where in a fused tensor it goes: ("….attn.qkv.weight", 1) is the middle third; None: unused.
    `language_prefixes` rename the beginnings of the other tensors for the language model (None: dropped).
    """

    describe: Callable[[Config, Config], Description]
    vision_prefixes: tuple[str, ...]
    vision_name: Callable[[str], tuple[str, int | None] | None]
    language_prefixes: Mapping[str, str | None]
    text_config: str

"""Common description of checkpoints, whatever their layout."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Tower:
    """Dimensions of InternViT (`vision_config`)."""

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
    select_layer: int = -1  # index into the hidden states whose output is used; -1: the last


@dataclass(frozen=True)
class Thresholds:
    """The router compresses a tile if its score exceeds the quantile `relative` and is at least `absolute`."""

    relative: float
    absolute: float


@dataclass(frozen=True)
class Description:
    """Description of a checkpoint, from its `config.json`, in the same terms for all layouts."""

    family: str  # for people: "InternVL 3.5 Flash"
    tower: Tower
    language_model: str  # architecture: "Qwen3ForCausalLM"
    language_layers: int
    width: int  # hidden size of the language model, hence width of a visual token
    vocabulary: int  # tokens
    context: int  # maximum position embeddings, in tokens
    dtype: str
    downsample_ratio: float
    pixel_shuffle: str  # "v1" (the feature map stays transposed) or "v2"
    min_tiles: int  # thumbnail not counted
    max_tiles: int  # thumbnail not counted
    thumbnail: bool
    template: str | None  # name of the conversation template
    thresholds: Thresholds | None  # None: no router

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of a tile that is not compressed."""
        side = self.tower.image_size // self.tower.patch_size
        return int(side * self.downsample_ratio) ** 2

    @property
    def compressed_tokens_per_tile(self) -> int:
        """Visual tokens of a compressed tile; 0 without a router."""
        return self.tokens_per_tile // 4 if self.thresholds else 0


@dataclass(frozen=True)
class Layout:
    """How checkpoints of one layout are read.

    Attributes:
        describe: returns the description from `config.json` and `preprocessor_config.json`, which may be empty.
        vision_prefixes: prefixes of the names of the tensors that a vision worker needs.
        vision_name: returns OpenGVLab's name of such a tensor and its part of a fused one: ("….attn.qkv.weight", 1) is
            the middle third, (…, None) all of it. None: the tensor is not used.
        language_prefixes: replacements of the prefixes of the other tensors' names for vLLM's model; None: dropped.
        text_config: key of the language model's configuration in `config.json`.
    """

    describe: Callable[[Config, Config], Description]
    vision_prefixes: tuple[str, ...]
    vision_name: Callable[[str], tuple[str, int | None] | None]
    language_prefixes: Mapping[str, str | None]
    text_config: str

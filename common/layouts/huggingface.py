"""Layout of transformers: `model_type` internvl, names as in its `modeling_internvl.py`.

Two spellings exist: that of the published files (`vision_tower.…`, `language_model.model.…`) and the modules' own names
(`model.vision_tower.…`, `model.language_model.…`, `lm_head.…`), which transformers 5 writes on request.
"""

import re
from typing import Any

from common.layouts.base import Config, Description, Layout, Tower

_TOWER = ("vision_tower.", "model.vision_tower.")
_PROJECTOR = ("multi_modal_projector.", "model.multi_modal_projector.")
PREFIXES = _TOWER + _PROJECTOR

_EMBEDDINGS = {
    "embeddings.cls_token": "vision_model.embeddings.class_embedding",
    "embeddings.position_embeddings": "vision_model.embeddings.position_embedding",
    "embeddings.patch_embeddings.projection.weight": "vision_model.embeddings.patch_embedding.weight",
    "embeddings.patch_embeddings.projection.bias": "vision_model.embeddings.patch_embedding.bias",
}
_LAYER = {
    "lambda_1": "ls1",
    "lambda_2": "ls2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.projection_layer": "attn.proj",
    "attention.q_norm": "attn.q_norm",
    "attention.k_norm": "attn.k_norm",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_PROJECTOR_LAYERS = {"layer_norm": "0", "linear_1": "1", "linear_2": "3"}
_QKV = {"attention.q_proj": 0, "attention.k_proj": 1, "attention.v_proj": 2}


def describe(config: Config, preprocessor: Config) -> Description:
    """Return the description of a checkpoint. Raises: `KeyError`, `TypeError` if the configuration is incomplete."""
    vision, language = config["vision_config"], config["text_config"]
    image_size = _side(vision["image_size"])
    return Description(
        family="InternVL (transformers layout)",
        tower=Tower(
            hidden_size=vision["hidden_size"],
            intermediate_size=vision["intermediate_size"],
            layers=vision["num_hidden_layers"],
            heads=vision["num_attention_heads"],
            image_size=image_size,
            patch_size=_side(vision["patch_size"]),
            norm=vision.get("norm_type", "layer_norm"),
            norm_eps=vision.get("layer_norm_eps", 1e-6),
            activation=vision.get("hidden_act", "gelu"),
            qkv_bias=vision.get("attention_bias", False),
            qk_norm=vision.get("use_qk_norm", False),
            select_layer=config.get("vision_feature_layer", -1),
        ),
        language_model=language.get("architectures", [language["model_type"]])[0],
        language_layers=language["num_hidden_layers"],
        width=language["hidden_size"],
        vocabulary=language["vocab_size"],
        context=language["max_position_embeddings"],
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"),
        downsample_ratio=config.get("downsample_ratio", 0.5),
        pixel_shuffle="v2",
        min_tiles=preprocessor.get("min_patches", 1),
        max_tiles=preprocessor.get("max_patches", 12),
        thumbnail=True,
        template=None,
        thresholds=None,
    )


def _side(value: Any) -> int:
    """Return the side of a square that is given as a number or as [height, width]."""
    return int(value[0] if isinstance(value, (list, tuple)) else value)


def vision_name(name: str) -> tuple[str, int | None] | None:
    """Return OpenGVLab's name of a vision tensor and its part of a fused one (see `Layout`)."""
    short = name.removeprefix("model.")
    if short.startswith("multi_modal_projector."):
        layer, _, kind = short.removeprefix("multi_modal_projector.").partition(".")
        return f"mlp1.{_PROJECTOR_LAYERS[layer]}.{kind}", None
    short = short.removeprefix("vision_tower.")
    if short in _EMBEDDINGS:
        return _EMBEDDINGS[short], None
    match = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+?)(\.weight|\.bias)?", short)
    if match is None:
        return None
    number, part, kind = match[1], match[2], match[3] or ""
    if part in _QKV:
        return f"vision_model.encoder.layers.{number}.attn.qkv{kind}", _QKV[part]
    return f"vision_model.encoder.layers.{number}.{_LAYER[part]}{kind}", None


LAYOUT = Layout(
    describe=describe,
    vision_prefixes=PREFIXES,
    vision_name=vision_name,
    language_prefixes={
        **dict.fromkeys(PREFIXES),
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "language_model.": "language_model.",
    },
    text_config="text_config",
)

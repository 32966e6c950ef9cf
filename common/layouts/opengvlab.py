"""Layout of OpenGVLab: `model_type` internvl_chat, names as in the published `modeling_internvl_chat.py`."""

from typing import Any

from common.layouts.base import Config, Description, Layout, Thresholds, Tower

PREFIXES = ("vision_model.", "mlp1.", "mlp2.", "pooling_before_gating.", "gating.")


def describe(config: Config, _preprocessor: Config) -> Description:
    """Return the description of a checkpoint. Raises: `KeyError`, `TypeError` if the configuration is incomplete."""
    vision, language = config["vision_config"], config["llm_config"]
    flash = bool(config.get("flash_mode"))
    image_size = config.get("force_image_size") or vision["image_size"]
    dynamic = config.get("dynamic_image_size", False)
    return Description(
        family=_family(config),
        tower=Tower(
            hidden_size=vision["hidden_size"],
            intermediate_size=vision["intermediate_size"],
            layers=vision["num_hidden_layers"],
            heads=vision["num_attention_heads"],
            image_size=image_size,
            patch_size=vision["patch_size"],
            norm=vision.get("norm_type", "rms_norm"),
            norm_eps=vision.get("layer_norm_eps", 1e-6),
            activation=vision.get("hidden_act", "gelu"),
            qkv_bias=vision.get("qkv_bias", False),
            qk_norm=vision.get("qk_normalization", True),
            select_layer=config.get("select_layer", -1),
        ),
        language_model=language.get("architectures", [language["model_type"]])[0],
        language_layers=language["num_hidden_layers"],
        width=language["hidden_size"],
        vocabulary=language["vocab_size"],
        context=language["max_position_embeddings"],
        dtype=str(config.get("torch_dtype") or config.get("dtype") or "bfloat16"),
        downsample_ratio=config.get("downsample_ratio", 0.5),
        pixel_shuffle=config.get("ps_version", "v1"),
        min_tiles=config.get("min_dynamic_patch", 1) if dynamic else 1,
        max_tiles=config.get("max_dynamic_patch", 6) if dynamic else 1,
        thumbnail=config.get("use_thumbnail", False),
        template=config.get("template"),
        thresholds=Thresholds(
            relative=config["flash_relative_threshold"], absolute=config["flash_absolute_threshold"]
        ) if flash else None,
    )  # fmt: skip


def _family(config: dict[str, Any] | Config) -> str:
    """Return a display name. The configuration has no generation; 2.5 and 3 cannot be distinguished."""
    language = config["llm_config"]["model_type"]
    if config.get("flash_mode"):
        return "InternVL 3.5 Flash"
    if language in ("qwen3", "qwen3_moe", "gpt_oss"):
        return "InternVL 3.5"
    if config.get("template") == "internvl2_5":
        return "InternVL 2.5 or 3"
    return "InternVL 2" if config.get("ps_version") == "v2" else "InternVL 1.x"


def vision_name(name: str) -> tuple[str, int | None] | None:
    """Return the name itself: names of this layout are the reference."""
    return (name, None) if name.startswith(PREFIXES) else None


LAYOUT = Layout(
    describe=describe,
    vision_prefixes=PREFIXES,
    vision_name=vision_name,
    language_prefixes={**dict.fromkeys(PREFIXES), "language_model.": "language_model."},
    text_config="llm_config",
)

"""Writes checkpoints of published shapes without weights: with `--load-format=dummy`, servers draw random ones."""

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.shapes import Shape

_FLASH = {"flash_mode": True, "flash_relative_threshold": 0.5, "flash_absolute_threshold": 0.0}
"""Half of the tiles are compressed, whatever their scores are."""


def write_model(folder: Path, shape: Shape, language: dict[str, Any] | None = None, flash: bool = True) -> Path:
    """Write the configuration of a checkpoint with this shape's tower.

    Args:
        folder: Is created.
        shape: Its tower, and the width of the language model.
        language: Further values of `llm_config`; without them the language model cannot be loaded, only described.
        flash: Whether the checkpoint has a router and a second projector.

    Returns:
        The folder.
    """
    tower = shape.tower
    vision = {
        "model_type": "intern_vit_6b", "hidden_size": tower.hidden_size, "intermediate_size": tower.intermediate_size,
        "num_hidden_layers": tower.layers, "num_attention_heads": tower.heads, "image_size": tower.image_size,
        "patch_size": tower.patch_size, "num_channels": 3, "norm_type": tower.norm, "layer_norm_eps": tower.norm_eps,
        "hidden_act": tower.activation, "qkv_bias": tower.qkv_bias, "qk_normalization": tower.qk_norm,
        "initializer_factor": 1.0, "dropout": 0.0,
    }  # fmt: skip
    text = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": shape.width, "num_hidden_layers": 1,
        "vocab_size": 1000, "max_position_embeddings": 40960, **(language or {}),
    }  # fmt: skip
    config = {
        "model_type": "internvl_chat", "architectures": ["InternVLChatModel"], "vision_config": vision, "llm_config": text,
        "force_image_size": tower.image_size, "dynamic_image_size": True, "use_thumbnail": True, "min_dynamic_patch": 1,
        "max_dynamic_patch": 12, "downsample_ratio": 0.5, "select_layer": -1, "ps_version": "v2", "template": "internvl2_5",
        "torch_dtype": "bfloat16", **(_FLASH if flash else {}),
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder

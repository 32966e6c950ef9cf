"""Sizes of the demo model, and its `config.json`."""

from typing import Any

from demo.scenes.scene import PATCH_PIXELS, TILE_PIXELS
from demo.text.tokenizer import EOS_ID, PAD_ID

VISION_WIDTH, VISION_LAYERS, VISION_HEADS = 192, 4, 6
LANGUAGE_WIDTH, LANGUAGE_MLP_WIDTH, LANGUAGE_LAYERS = 256, 768, 4
LANGUAGE_HEADS, LANGUAGE_KV_HEADS, LANGUAGE_HEAD_WIDTH = 4, 2, 64
CONTEXT_TOKENS = 8192


def checkpoint_config(vocabulary_size: int, relative_threshold: float = 0.2, absolute_threshold: float = 0.5) -> dict[str, Any]:
    """Return the content of `config.json`, in the layout of the published InternVL3.5-Flash.

    The two thresholds are the defaults of the router.
    """
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "force_image_size": TILE_PIXELS,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "select_layer": -1,
        "ps_version": "v2",
        "template": "internvl2_5",
        "torch_dtype": "bfloat16",
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "image_size": TILE_PIXELS,
            "patch_size": PATCH_PIXELS,
            "num_channels": 3,
            "hidden_size": VISION_WIDTH,
            "intermediate_size": 4 * VISION_WIDTH,
            "num_hidden_layers": VISION_LAYERS,
            "num_attention_heads": VISION_HEADS,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "norm_type": "layer_norm",
            "qkv_bias": True,
            "qk_normalization": False,
            "attention_dropout": 0.0,
            "dropout": 0.0,
            "drop_path_rate": 0.0,
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "use_flash_attn": False,
        },
        "llm_config": {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": vocabulary_size,
            "hidden_size": LANGUAGE_WIDTH,
            "intermediate_size": LANGUAGE_MLP_WIDTH,
            "num_hidden_layers": LANGUAGE_LAYERS,
            "num_attention_heads": LANGUAGE_HEADS,
            "num_key_value_heads": LANGUAGE_KV_HEADS,
            "head_dim": LANGUAGE_HEAD_WIDTH,
            "max_position_embeddings": CONTEXT_TOKENS,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 100000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": PAD_ID,
            "eos_token_id": EOS_ID,
            "pad_token_id": PAD_ID,
        },
        "flash_mode": True,
        "flash_relative_threshold": relative_threshold,
        "flash_absolute_threshold": absolute_threshold,
    }

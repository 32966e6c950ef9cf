"""Tiny InternVL checkpoints with random weights, in the layouts of the published ones.

For tests and benchmarks. Weights are scaled so that activations keep their size from layer to layer, and greedy answers
differ from image to image.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.checkpoint_files import (
    CLIP_PREPROCESSOR,
    NATIVE_PREPROCESSOR,
    NATIVE_TOKENIZER,
    TOKENIZER,
    chat_template,
    make_chat_template_text_only,
    random_tensor,
    read_json,
    write_common_files,
    write_json,
    write_weights,
)
from tests.checkpoint_language import (
    EOS,
    HIDDEN,
    LANGUAGES,
    PAD,
    Config,
    Shapes,
    language_config,
    language_shapes,
    linear,
    norm,
)

IMAGE_TOKEN = 5  # <IMG_CONTEXT>


@dataclass(frozen=True)
class Recipe:
    """The options of a checkpoint in OpenGVLab's layout."""

    language: str = "qwen3"  # a key of LANGUAGES
    tower: str = "300m"  # a key of TOWERS: InternViT-300M or InternViT-6B
    flash: bool = False
    pixel_shuffle: str = "v2"
    select_layer: int = -1
    template: str | None = None  # None: the template that the language model was published with
    chat_template: str = "multimodal"  # takes content parts; "text": takes strings only
    dtype: str = "float32"
    layers: int = 3
    context: int = 8192
    max_tiles: int = 12
    relative_threshold: float = 0.2
    absolute_threshold: float = 0.5
    shards: int = 1
    seed: int = 0


TOWERS: dict[str, Config] = {
    "300m": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
        "qkv_bias": True, "qk_normalization": False, "norm_type": "layer_norm",
    },
    "6b": {
        "hidden_size": 80, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 5,
        "qkv_bias": False, "qk_normalization": True, "norm_type": "rms_norm",
    },
}  # fmt: skip


def write_checkpoint(folder: str | Path, **options: Any) -> Path:
    """Writes a checkpoint in OpenGVLab's layout (`internvl_chat`) and returns its folder.

    `options` are the fields of Recipe.
    """
    recipe = Recipe(**options)
    folder = Path(folder)
    config = official_config(recipe)
    write_common_files(folder, config, chat_template(str(config["template"]), "<image>\n"))
    if recipe.chat_template == "text":
        make_chat_template_text_only(folder, str(config["template"]))
    write_json(folder / "preprocessor_config.json", CLIP_PREPROCESSOR)
    shapes = vision_shapes(recipe) | {
        f"language_model.{name}": shape for name, shape in language_shapes(recipe.language, recipe.layers).items()
    }
    write_weights(folder, shapes, recipe.dtype, recipe.seed, recipe.shards)
    return folder


def official_config(recipe: Recipe) -> Config:
    """Returns `config.json` in OpenGVLab's layout."""
    config: Config = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "force_image_size": 448,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": recipe.max_tiles,
        "select_layer": recipe.select_layer,
        "ps_version": recipe.pixel_shuffle,
        "template": recipe.template or LANGUAGES[recipe.language].template,
        "torch_dtype": recipe.dtype,
        "vision_config": _vision_config(recipe.tower),
        "llm_config": language_config(recipe.language, recipe.layers, recipe.context, recipe.dtype),
    }
    if recipe.flash:
        config |= {
            "flash_mode": True,
            "flash_relative_threshold": recipe.relative_threshold,
            "flash_absolute_threshold": recipe.absolute_threshold,
        }
    return config


def _vision_config(tower: str) -> Config:
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",  # InternViT-300M has it too
        "image_size": 448,
        "patch_size": 14,
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "drop_path_rate": 0.0,
        "use_flash_attn": False,
        **TOWERS[tower],
    }


def write_native_checkpoint(
    folder: str | Path, language: str = "qwen3", dtype: str = "float32", tensor_names: str = "hub", seed: int = 0
) -> Path:
    """Writes a checkpoint in transformers' layout (`internvl`) and returns its folder.

    Args:
        folder: Folder to write to.
        language: "qwen2" or "qwen3".
        dtype: Dtype of the weights.
        tensor_names: "hub" for the names in the published files, "module" for those of transformers' modules.
        seed: Seed of the weights.
    """
    from transformers import AutoConfig, InternVLConfig, InternVLForConditionalGeneration

    text = language_config(language, Recipe.layers, Recipe.context, dtype)
    text["vocab_size"] += 11  # room for <video>, padded like the published ones
    model_type = text.pop("model_type")
    config = InternVLConfig(
        text_config=AutoConfig.for_model(model_type, **text).to_dict(),
        vision_config=_native_vision_config(),
        image_token_id=IMAGE_TOKEN,
        tie_word_embeddings=False,
        dtype=dtype,
    )
    model = InternVLForConditionalGeneration(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_tensor(name, tuple(parameter.shape), seed))
    model.generation_config.update(eos_token_id=EOS, pad_token_id=PAD)
    folder = Path(folder)
    write_common_files(folder, {}, chat_template("internvl2_5", "<IMG_CONTEXT>\n"))
    model.save_pretrained(folder, save_original_format=tensor_names == "hub")
    write_json(folder / "tokenizer_config.json", read_json(TOKENIZER / "tokenizer_config.json") | NATIVE_TOKENIZER)
    write_json(folder / "preprocessor_config.json", NATIVE_PREPROCESSOR)
    write_json(folder / "processor_config.json", {"image_seq_length": 256, "processor_class": "InternVLProcessor"})
    return folder


def _native_vision_config() -> Config:
    tower = TOWERS["300m"]
    return {
        "hidden_size": tower["hidden_size"],
        "intermediate_size": tower["intermediate_size"],
        "num_hidden_layers": tower["num_hidden_layers"],
        "num_attention_heads": tower["num_attention_heads"],
        "attention_bias": True,
        "norm_type": "layer_norm",
        "image_size": [448, 448],
        "patch_size": [14, 14],
    }


def vision_shapes(recipe: Recipe) -> Shapes:
    """Returns every tensor that a vision worker needs."""
    width = TOWERS[recipe.tower]["hidden_size"]
    shapes = {f"vision_model.{n}": s for n, s in _tower_shapes(TOWERS[recipe.tower]).items()}
    shapes |= norm("mlp1.0", 4 * width) | linear("mlp1.1", HIDDEN, 4 * width) | linear("mlp1.3", HIDDEN, HIDDEN)
    return shapes | _flash_shapes(width) if recipe.flash else shapes


def _tower_shapes(tower: Config) -> Shapes:
    width, inner = tower["hidden_size"], tower["intermediate_size"]
    has_bias = tower["norm_type"] == "layer_norm"
    shapes: Shapes = {
        "embeddings.class_embedding": (1, 1, width),
        "embeddings.position_embedding": (1, 1025, width),
        "embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "embeddings.patch_embedding.bias": (width,),
    }
    for layer in range(tower["num_hidden_layers"]):
        at = f"encoder.layers.{layer}."
        shapes |= {f"{at}ls1": (width,), f"{at}ls2": (width,)}
        shapes |= norm(f"{at}norm1", width, has_bias) | norm(f"{at}norm2", width, has_bias)
        shapes |= linear(f"{at}attn.qkv", 3 * width, width, tower["qkv_bias"])
        shapes |= linear(f"{at}attn.proj", width, width)
        shapes |= linear(f"{at}mlp.fc1", inner, width) | linear(f"{at}mlp.fc2", width, inner)
        if tower["qk_normalization"]:
            shapes |= norm(f"{at}attn.q_norm", width, False) | norm(f"{at}attn.k_norm", width, False)
    return shapes


def _flash_shapes(width: int) -> Shapes:
    wide = 2 * HIDDEN
    shapes = norm("mlp2.0", 16 * width) | linear("mlp2.1", wide, 16 * width)
    shapes |= linear("mlp2.4", wide, wide) | linear("mlp2.7", HIDDEN, wide)
    shapes |= {"pooling_before_gating.query_token": (1, width)}
    for i in range(1, 5):
        at = f"pooling_before_gating.attn{i}."
        shapes |= {f"{at}in_proj_weight": (3 * width, width), f"{at}in_proj_bias": (3 * width,)}
        shapes |= linear(f"{at}out_proj", width, width) | norm(f"pooling_before_gating.norm{i}", width)
        block = f"gating.block{i}."
        shapes |= linear(f"{block}0", 4 * width, width) | linear(f"{block}3", width, 4 * width)
        shapes |= norm(f"{block}5", width)
    return shapes | norm("gating.gate.0", width) | linear("gating.gate.1", 2, width)

"""Tiny InternVL checkpoints with random weights, in the layouts that the published ones have.

For tests and benchmarks. Weights are scaled so that activations keep their size from layer to layer, and greedy answers
differ from image to image.
"""

import json
import math
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TOKENIZER = Path(__file__).parent / "data" / "tokenizer"
VOCABULARY = 373
IMAGE_TOKEN = 5  # <IMG_CONTEXT>
EOS, PAD = 2, 0

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 128, 256, 4, 2, 32
EXPERTS, EXPERTS_PER_TOKEN, EXPERT_INTERMEDIATE = 4, 2, 64
Q, KV = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM

Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Recipe:
    """What may be chosen of a checkpoint in OpenGVLab's layout."""

    language: str = "qwen3"  # a key of LANGUAGES
    tower: str = "300m"  # a key of TOWERS: which of the two InternViTs it is built like
    flash: bool = False
    pixel_shuffle: str = "v2"
    select_layer: int = -1
    template: str | None = None  # None: the one that the language model's generation was published with
    chat_template: str = "multimodal"  # turns content parts into <image>, or "text": knows strings only
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

# The end of a turn in each conversation template.
SEPARATORS = {
    "internvl2_5": "<|im_end|>\n",
    "Hermes-2": "<|im_end|>",
    "internlm2-chat": "<|im_end|>",
    "phi3-chat": "<|end|>",
    "internvl3_5_gpt_oss": "<|end|>",
}


def make(folder: str | Path, **choices: Any) -> Path:
    """Write a checkpoint in OpenGVLab's layout (`internvl_chat`). `choices` are the fields of `Recipe`."""
    recipe = Recipe(**choices)
    folder = Path(folder)
    config = official_config(recipe)
    _write_common(folder, config, _chat_template(str(config["template"]), "<image>\n"))
    if recipe.chat_template == "text":
        _make_text_only(folder, str(config["template"]))
    _json(folder / "preprocessor_config.json", _CLIP_PREPROCESSOR)
    shapes = vision_shapes(recipe) | {f"language_model.{name}": shape for name, shape in language_shapes(recipe).items()}
    _save(folder, shapes, recipe.dtype, recipe.seed, recipe.shards)
    return folder


def official_config(recipe: Recipe) -> Config:
    """`config.json` in OpenGVLab's layout."""
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
        "llm_config": _language_config(recipe),
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
        "model_type": "intern_vit_6b",  # of the 300M too
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


# The vision side


def vision_shapes(recipe: Recipe) -> Shapes:
    """Every tensor that a vision worker needs."""
    width = TOWERS[recipe.tower]["hidden_size"]
    shapes = {f"vision_model.{n}": s for n, s in _tower_shapes(TOWERS[recipe.tower]).items()}
    shapes |= _norm("mlp1.0", 4 * width) | _linear("mlp1.1", HIDDEN, 4 * width) | _linear("mlp1.3", HIDDEN, HIDDEN)
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
        shapes |= _norm(f"{at}norm1", width, has_bias) | _norm(f"{at}norm2", width, has_bias)
        shapes |= _linear(f"{at}attn.qkv", 3 * width, width, tower["qkv_bias"])
        shapes |= _linear(f"{at}attn.proj", width, width)
        shapes |= _linear(f"{at}mlp.fc1", inner, width) | _linear(f"{at}mlp.fc2", width, inner)
        if tower["qk_normalization"]:
            shapes |= _norm(f"{at}attn.q_norm", width, False) | _norm(f"{at}attn.k_norm", width, False)
    return shapes


def _flash_shapes(width: int) -> Shapes:
    wide = 2 * HIDDEN
    shapes = _norm("mlp2.0", 16 * width) | _linear("mlp2.1", wide, 16 * width)
    shapes |= _linear("mlp2.4", wide, wide) | _linear("mlp2.7", HIDDEN, wide)
    shapes |= {"pooling_before_gating.query_token": (1, width)}
    for i in range(1, 5):
        at = f"pooling_before_gating.attn{i}."
        shapes |= {f"{at}in_proj_weight": (3 * width, width), f"{at}in_proj_bias": (3 * width,)}
        shapes |= _linear(f"{at}out_proj", width, width) | _norm(f"pooling_before_gating.norm{i}", width)
        block = f"gating.block{i}."
        shapes |= _linear(f"{block}0", 4 * width, width) | _linear(f"{block}3", width, 4 * width)
        shapes |= _norm(f"{block}5", width)
    return shapes | _norm("gating.gate.0", width) | _linear("gating.gate.1", 2, width)


def _linear(name: str, rows: int, columns: int, bias: bool = True) -> Shapes:
    weight: Shapes = {f"{name}.weight": (rows, columns)}
    return weight | {f"{name}.bias": (rows,)} if bias else weight


def _norm(name: str, width: int, bias: bool = True) -> Shapes:
    weight: Shapes = {f"{name}.weight": (width,)}
    return weight | {f"{name}.bias": (width,)} if bias else weight


# The language models, each under its own names


@dataclass(frozen=True)
class Language:
    """A language model: what its config has beyond the common fields, and how its tensors are called."""

    architecture: str
    model_type: str
    template: str
    naming: str  # a key of _LAYERS
    extra: Config


def _remote(name: str, model: str) -> Config:
    """What the exports of models that came with their own code carry."""
    return {
        "auto_map": {
            "AutoConfig": f"configuration_{name}.{model}Config",
            "AutoModel": f"modeling_{name}.{model}ForCausalLM",
            "AutoModelForCausalLM": f"modeling_{name}.{model}ForCausalLM",
        }
    }


LANGUAGES: dict[str, Language] = {
    "qwen2": Language("Qwen2ForCausalLM", "qwen2", "internvl2_5", "qwen2", {}),
    "qwen3": Language("Qwen3ForCausalLM", "qwen3", "internvl2_5", "qwen3", {"head_dim": HEAD_DIM}),
    "qwen3_moe": Language(
        "Qwen3MoeForCausalLM", "qwen3_moe", "internvl2_5", "qwen3_moe",
        {
            "head_dim": HEAD_DIM, "num_experts": EXPERTS, "num_experts_per_tok": EXPERTS_PER_TOKEN,
            "moe_intermediate_size": EXPERT_INTERMEDIATE, "norm_topk_prob": True, "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
    "llama": Language("LlamaForCausalLM", "llama", "Hermes-2", "llama", {}),
    "internlm2": Language(
        "InternLM2ForCausalLM", "internlm2", "internlm2-chat", "internlm2",
        {"bias": False, "rope_scaling": {"type": "dynamic", "factor": 2.0}, **_remote("internlm2", "InternLM2")},
    ),
    "internlm3": Language(
        "InternLM3ForCausalLM", "internlm3", "internvl2_5", "llama",
        {
            "bias": False, "qkv_bias": False, "head_dim": HEAD_DIM,
            "rope_scaling": {"rope_type": "dynamic", "factor": 6.0}, **_remote("internlm3", "InternLM3"),
        },
    ),
    "phi3": Language(
        "Phi3ForCausalLM", "phi3", "phi3-chat", "phi3",
        {
            "original_max_position_embeddings": 4096, "sliding_window": 262144,
            "rope_scaling": {
                "type": "su", "long_factor": [1.5] * (HEAD_DIM // 2), "short_factor": [1.0] * (HEAD_DIM // 2),
            },
            **_remote("phi3", "Phi3"),
        },
    ),
    "gpt_oss": Language(
        "GptOssForCausalLM", "gpt_oss", "internvl3_5_gpt_oss", "gpt_oss",
        {
            "head_dim": HEAD_DIM, "num_local_experts": EXPERTS, "num_experts_per_tok": EXPERTS_PER_TOKEN,
            "attention_bias": True, "sliding_window": 128, "swiglu_limit": 7.0, "rope_theta": 150000,
            "rope_scaling": {
                "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096,
                "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            },
        },
    ),
}  # fmt: skip


def _language_config(recipe: Recipe) -> Config:
    language = LANGUAGES[recipe.language]
    config: Config = {
        "architectures": [language.architecture],
        "model_type": language.model_type,
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": recipe.context,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": recipe.dtype,
        "bos_token_id": PAD,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        **language.extra,
    }
    if recipe.language == "gpt_oss":
        config["layer_types"] = [("sliding_attention", "full_attention")[i % 2] for i in range(recipe.layers)]
    return config


def language_shapes(recipe: Recipe) -> Shapes:
    """Every tensor of the language model, under the names that it has alone (no `language_model.`)."""
    naming = LANGUAGES[recipe.language].naming
    embedding, head = ("tok_embeddings", "output") if naming == "internlm2" else ("embed_tokens", "lm_head")
    shapes: Shapes = {
        f"model.{embedding}.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        f"{head}.weight": (VOCABULARY, HIDDEN),
    }
    for layer in range(recipe.layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in _LAYERS[naming].items()}
    return shapes


def _attention(bias: bool = False, o_bias: bool = False) -> Shapes:
    shapes = _linear("self_attn.q_proj", Q, HIDDEN, bias)
    shapes |= _linear("self_attn.k_proj", KV, HIDDEN, bias) | _linear("self_attn.v_proj", KV, HIDDEN, bias)
    return shapes | _linear("self_attn.o_proj", HIDDEN, Q, o_bias)


def _gated(at: str, inner: int) -> Shapes:
    shapes = _linear(f"{at}.gate_proj", inner, HIDDEN, False) | _linear(f"{at}.up_proj", inner, HIDDEN, False)
    return shapes | _linear(f"{at}.down_proj", HIDDEN, inner, False)


def _norms(*names: str) -> Shapes:
    return {f"{name}.weight": (HIDDEN,) for name in names}


_NORMS = _norms("input_layernorm", "post_attention_layernorm")
_QK_NORMS: Shapes = {"self_attn.q_norm.weight": (HEAD_DIM,), "self_attn.k_norm.weight": (HEAD_DIM,)}
_EXPERTS = {n: s for i in range(EXPERTS) for n, s in _gated(f"mlp.experts.{i}", EXPERT_INTERMEDIATE).items()}

_LAYERS: dict[str, Shapes] = {
    "llama": _NORMS | _attention() | _gated("mlp", INTERMEDIATE),
    "qwen2": _NORMS | _attention(bias=True) | _gated("mlp", INTERMEDIATE),
    "qwen3": _NORMS | _attention() | _QK_NORMS | _gated("mlp", INTERMEDIATE),
    "qwen3_moe": _NORMS | _attention() | _QK_NORMS | _linear("mlp.gate", EXPERTS, HIDDEN, False) | _EXPERTS,
    "phi3": {
        **_NORMS,
        "self_attn.qkv_proj.weight": (Q + 2 * KV, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, Q),
        "mlp.gate_up_proj.weight": (2 * INTERMEDIATE, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
    },
    "internlm2": {
        **_norms("attention_norm", "ffn_norm"),
        "attention.wqkv.weight": (Q + 2 * KV, HIDDEN),  # rows by key-value head: its queries, its key, its value
        "attention.wo.weight": (HIDDEN, Q),
        "feed_forward.w1.weight": (INTERMEDIATE, HIDDEN),
        "feed_forward.w3.weight": (INTERMEDIATE, HIDDEN),
        "feed_forward.w2.weight": (HIDDEN, INTERMEDIATE),
    },
    "gpt_oss": {
        **_NORMS,
        **_attention(bias=True, o_bias=True),
        "self_attn.sinks": (HEADS,),
        **_linear("mlp.router", EXPERTS, HIDDEN),
        "mlp.experts.gate_up_proj": (EXPERTS, HIDDEN, 2 * INTERMEDIATE),  # gate and up alternate in the last axis
        "mlp.experts.gate_up_proj_bias": (EXPERTS, 2 * INTERMEDIATE),
        "mlp.experts.down_proj": (EXPERTS, INTERMEDIATE, HIDDEN),
        "mlp.experts.down_proj_bias": (EXPERTS, HIDDEN),
    },
}


# transformers' own layout


def make_native(
    folder: str | Path, language: str = "qwen3", dtype: str = "float32", spelling: str = "hub", seed: int = 0
) -> Path:
    """Write a checkpoint in transformers' layout (`internvl`), with a Qwen2 or Qwen3 inside.

    `spelling` of the tensors: "hub" as in the published files, "module" as transformers calls them in memory.
    """
    from transformers import AutoConfig, InternVLConfig, InternVLForConditionalGeneration

    recipe = Recipe(language=language, dtype=dtype, seed=seed)
    text = _language_config(recipe) | {"vocab_size": VOCABULARY + 11}  # room for <video>; padded as the published are
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
            parameter.copy_(_draw(name, tuple(parameter.shape), seed))
    model.generation_config.update(eos_token_id=EOS, pad_token_id=PAD)
    folder = Path(folder)
    _write_common(folder, {}, _chat_template("internvl2_5", "<IMG_CONTEXT>\n"))
    model.save_pretrained(folder, save_original_format=spelling == "hub")
    _json(folder / "tokenizer_config.json", _read(TOKENIZER / "tokenizer_config.json") | _NATIVE_TOKENIZER)
    _json(folder / "preprocessor_config.json", _NATIVE_PREPROCESSOR)
    _json(folder / "processor_config.json", {"image_seq_length": 256, "processor_class": "InternVLProcessor"})
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


# Weights

_LARGE = {"gating.gate.1.weight": 9.0}  # spreads the router's scores, so that some tiles are compressed and some are not


def _draw(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """A tensor that depends on nothing but its name, its shape and the seed."""
    part = name.rsplit(".", 2)[-2:]
    if part[-1] in ("ls1", "ls2", "lambda_1", "lambda_2"):
        return torch.ones(shape)
    if part[-1] == "weight" and len(shape) == 1:
        return torch.ones(shape)  # of a norm
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ seed)
    return torch.randn(shape, generator=generator) * _deviation(name, shape)


def _deviation(name: str, shape: tuple[int, ...]) -> float:
    if name.endswith(("embed_tokens.weight", "tok_embeddings.weight", "sinks")):
        return 1.0
    if name.endswith("bias") or ("embedding" in name and "patch" not in name) or name.endswith("cls_token"):
        return 0.05
    experts = len(shape) == 3 and ".experts." in name
    fan_in = shape[1] if experts else math.prod(shape[1:])
    gain = 1.6 if "language_model." in name or "lm_head" in name else _LARGE.get(name, 0.9)
    return gain / math.sqrt(fan_in)


# Files


def _save(folder: Path, shapes: Shapes, dtype: str, seed: int, shards: int) -> None:
    tensors = {name: _draw(name, shape, seed).to(getattr(torch, dtype)) for name, shape in shapes.items()}
    if shards == 1:
        _save_file(tensors, folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(_split(sorted(tensors), shards), start=1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        _save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    _json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})


def _save_file(tensors: dict[str, torch.Tensor], file: Path) -> None:
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # the library makes it its owner's alone, and a container's user is another


def _split(names: list[str], parts: int) -> Iterator[list[str]]:
    size = math.ceil(len(names) / parts)
    return (names[i * size : (i + 1) * size] for i in range(parts))


def _write_common(folder: Path, config: Mapping[str, Any], chat_template: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in TOKENIZER.iterdir():
        shutil.copyfile(file, folder / file.name)
    _json(folder / "config.json", config)
    _json(folder / "generation_config.json", {"eos_token_id": EOS, "pad_token_id": PAD, "do_sample": False})
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def _turns(template: str) -> tuple[str, str, str]:
    """What begins a turn (Jinja), what begins the answer, and what ends a turn."""
    end = json.dumps(SEPARATORS[template])
    if template == "phi3-chat":
        return r"'<|' + message['role'] + '|>\n'", r"'<|assistant|>\n'", end
    if template == "internvl3_5_gpt_oss":
        answer = "'<|start|>assistant<|channel|>final<|message|>'"
        return "'<|start|>' + message['role'] + '<|message|>'", answer, end
    return r"'<|im_start|>' + message['role'] + '\n'", r"'<|im_start|>assistant\n'", end


def _chat_template(template: str, placeholder: str) -> str:
    begin, answer, end = _turns(template)
    parts: Iterable[str] = (
        "{% for message in messages %}{{ ", begin, " }}",
        "{% if message['content'] is string %}{{ message['content'] }}",
        "{% else %}{% for content in message['content'] %}",
        "{% if content['type'] == 'image' %}{{ ", json.dumps(placeholder), " }}",
        "{% elif content['type'] == 'video' %}{{ '<video>\\n' }}",
        "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}",
        "{% endfor %}{% endif %}{{ ", end, " }}{% endfor %}",
        "{% if add_generation_prompt %}{{ ", answer, " }}{% endif %}",
    )  # fmt: skip
    return "".join(parts)


def _make_text_only(folder: Path, template: str) -> None:
    """As exports before 3.5 have it: in tokenizer_config.json, and a message's content can only be a string."""
    begin, answer, end = _turns(template)
    text = f"{{% for message in messages %}}{{{{ {begin} + message['content'] + {end} }}}}{{% endfor %}}"
    text += f"{{% if add_generation_prompt %}}{{{{ {answer} }}}}{{% endif %}}"
    (folder / "chat_template.jinja").unlink()
    _json(folder / "tokenizer_config.json", _read(folder / "tokenizer_config.json") | {"chat_template": text})


def _read(file: Path) -> Config:
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


_MEAN, _DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_CLIP_PREPROCESSOR = {
    "crop_size": 448, "do_center_crop": True, "do_normalize": True, "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": _MEAN, "image_std": _DEVIATION, "resample": 3,
    "size": 448,
}  # fmt: skip
_NATIVE_PREPROCESSOR = {
    "crop_to_patches": True, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
    "image_mean": _MEAN, "image_processor_type": "GotOcr2ImageProcessorFast", "image_std": _DEVIATION,
    "max_patches": 12, "min_patches": 1, "processor_class": "InternVLProcessor", "resample": 3,
    "rescale_factor": 1 / 255, "size": {"height": 448, "width": 448},
}  # fmt: skip
_NATIVE_TOKENIZER = {
    "context_image_token": "<IMG_CONTEXT>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "video_token": "<video>",
    "extra_special_tokens": {
        "context_image_token": "<IMG_CONTEXT>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "video_token": "<video>",
    },
    "processor_class": "InternVLProcessor",
}

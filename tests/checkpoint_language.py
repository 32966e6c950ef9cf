"""The language models of tiny checkpoints: configuration and tensors, under each model's own names."""

from dataclasses import dataclass
from typing import Any

VOCABULARY = 373
EOS, PAD = 2, 0
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 128, 256, 4, 2, 32
EXPERTS, EXPERTS_PER_TOKEN, EXPERT_INTERMEDIATE = 4, 2, 64
Q, KV = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM

Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Language:
    """A language model: the fields that only its configuration has, and the names of its tensors."""

    architecture: str
    model_type: str
    template: str
    naming: str  # a key of _LAYERS
    extra: Config


def _auto_map(name: str, model: str) -> Config:
    """Returns the `auto_map` of models that were published with their own code."""
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
        {"bias": False, "rope_scaling": {"type": "dynamic", "factor": 2.0}, **_auto_map("internlm2", "InternLM2")},
    ),
    "internlm3": Language(
        "InternLM3ForCausalLM", "internlm3", "internvl2_5", "llama",
        {
            "bias": False, "qkv_bias": False, "head_dim": HEAD_DIM,
            "rope_scaling": {"rope_type": "dynamic", "factor": 6.0}, **_auto_map("internlm3", "InternLM3"),
        },
    ),
    "phi3": Language(
        "Phi3ForCausalLM", "phi3", "phi3-chat", "phi3",
        {
            "original_max_position_embeddings": 4096, "sliding_window": 262144,
            "rope_scaling": {
                "type": "su", "long_factor": [1.5] * (HEAD_DIM // 2), "short_factor": [1.0] * (HEAD_DIM // 2),
            },
            **_auto_map("phi3", "Phi3"),
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


def language_config(language: str, layers: int, context: int, dtype: str) -> Config:
    """Returns the configuration of a language model, as `llm_config` has it. `language` is a key of LANGUAGES."""
    model = LANGUAGES[language]
    config: Config = {
        "architectures": [model.architecture],
        "model_type": model.model_type,
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": context,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "bos_token_id": PAD,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        **model.extra,
    }
    if language == "gpt_oss":
        config["layer_types"] = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    return config


def language_shapes(language: str, layers: int) -> Shapes:
    """Returns every tensor of a language model, under the names of the model on its own (without `language_model.`)."""
    naming = LANGUAGES[language].naming
    embedding, head = ("tok_embeddings", "output") if naming == "internlm2" else ("embed_tokens", "lm_head")
    shapes: Shapes = {
        f"model.{embedding}.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        f"{head}.weight": (VOCABULARY, HIDDEN),
    }
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in _LAYERS[naming].items()}
    return shapes


def linear(name: str, rows: int, columns: int, bias: bool = True) -> Shapes:
    """Returns the tensors of a linear layer."""
    weight: Shapes = {f"{name}.weight": (rows, columns)}
    return weight | {f"{name}.bias": (rows,)} if bias else weight


def norm(name: str, width: int, bias: bool = True) -> Shapes:
    """Returns the tensors of a layer norm, or of an RMS norm (no bias)."""
    weight: Shapes = {f"{name}.weight": (width,)}
    return weight | {f"{name}.bias": (width,)} if bias else weight


def _attention(bias: bool = False, o_bias: bool = False) -> Shapes:
    shapes = linear("self_attn.q_proj", Q, HIDDEN, bias)
    shapes |= linear("self_attn.k_proj", KV, HIDDEN, bias) | linear("self_attn.v_proj", KV, HIDDEN, bias)
    return shapes | linear("self_attn.o_proj", HIDDEN, Q, o_bias)


def _gated(at: str, inner: int) -> Shapes:
    shapes = linear(f"{at}.gate_proj", inner, HIDDEN, False) | linear(f"{at}.up_proj", inner, HIDDEN, False)
    return shapes | linear(f"{at}.down_proj", HIDDEN, inner, False)


def _norms(*names: str) -> Shapes:
    return {f"{name}.weight": (HIDDEN,) for name in names}


_NORMS = _norms("input_layernorm", "post_attention_layernorm")

_QK_NORMS: Shapes = {"self_attn.q_norm.weight": (HEAD_DIM,), "self_attn.k_norm.weight": (HEAD_DIM,)}

_EXPERTS = {n: s for i in range(EXPERTS) for n, s in _gated(f"mlp.experts.{i}", EXPERT_INTERMEDIATE).items()}

_LAYERS: dict[str, Shapes] = {
    "llama": _NORMS | _attention() | _gated("mlp", INTERMEDIATE),
    "qwen2": _NORMS | _attention(bias=True) | _gated("mlp", INTERMEDIATE),
    "qwen3": _NORMS | _attention() | _QK_NORMS | _gated("mlp", INTERMEDIATE),
    "qwen3_moe": _NORMS | _attention() | _QK_NORMS | linear("mlp.gate", EXPERTS, HIDDEN, False) | _EXPERTS,
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
        **linear("mlp.router", EXPERTS, HIDDEN),
        "mlp.experts.gate_up_proj": (EXPERTS, HIDDEN, 2 * INTERMEDIATE),  # gate and up alternate in the last axis
        "mlp.experts.gate_up_proj_bias": (EXPERTS, 2 * INTERMEDIATE),
        "mlp.experts.down_proj": (EXPERTS, INTERMEDIATE, HIDDEN),
        "mlp.experts.down_proj_bias": (EXPERTS, HIDDEN),
    },
}

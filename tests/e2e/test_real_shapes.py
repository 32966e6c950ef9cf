"""InternVL3.5-1B-Flash, a published model, answers at its true widths: random weights, four layers in each half."""

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.serving import GOLDEN, QUICK, image_part, up

TOWER = {
    "architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", "hidden_size": 1024, "intermediate_size": 4096,
    "num_hidden_layers": 4, "num_attention_heads": 16, "image_size": 448, "patch_size": 14, "qkv_bias": True,
    "qk_normalization": False, "norm_type": "layer_norm", "hidden_act": "gelu", "layer_norm_eps": 1e-6,
}  # fmt: skip
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024,
    "intermediate_size": 3072, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 40960, "rope_theta": 1000000, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "hidden_act": "silu", "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture
def flash_1b(tmp_path: Path) -> Path:
    """The model's `config.json` with a small tokenizer and no weights."""
    source = GOLDEN / "flash-qwen3/checkpoint"
    folder = tmp_path / "InternVL3_5-1B-Flash"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((source / "config.json").read_text())
    config |= {"torch_dtype": "bfloat16", "vision_config": TOWER, "llm_config": QWEN3_06B}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.timeout(600)
def test_internvl3_5_1b_flash_answers_at_its_true_widths(flash_1b: Path) -> None:
    small = ("--load-format=dummy", "--max-batch-tiles=1", "--vision-dtype=float32")
    with up(flash_1b, *small, vllm=(*QUICK, "--max-model-len=2048")) as served:
        answer = served.chat(image_part("square.png"), "what is shown?", max_tokens=4, ignore_eos=True)
        assert answer.status == 200, answer.text
        assert answer.json["usage"]["completion_tokens"] == 4
        assert answer.json["usage"]["prompt_tokens"] > 256
        assert answer.json["model"] == "InternVL3_5-1B-Flash"

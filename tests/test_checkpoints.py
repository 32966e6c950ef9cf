"""The tiny checkpoints have the layouts of the published ones."""

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from common.checkpoint import open_checkpoint, read_header
from tests.checkpoint_language import LANGUAGES
from tests.checkpoints import IMAGE_TOKEN, TOWERS, write_checkpoint, write_native_checkpoint

DISTINCTIVE_TENSORS = {
    "qwen2": ("model.layers.0.self_attn.q_proj.bias", (128,)),
    "qwen3": ("model.layers.0.self_attn.q_norm.weight", (32,)),
    "qwen3_moe": ("model.layers.0.mlp.experts.3.gate_proj.weight", (64, 128)),
    "llama": ("model.layers.0.mlp.up_proj.weight", (256, 128)),
    "internlm2": ("model.layers.0.attention.wqkv.weight", (256, 128)),
    "internlm3": ("model.layers.0.self_attn.q_proj.weight", (128, 128)),
    "phi3": ("model.layers.0.self_attn.qkv_proj.weight", (256, 128)),
    "gpt_oss": ("model.layers.0.mlp.experts.gate_up_proj", (4, 128, 512)),
}
"""A tensor of a layer that only this language model has, or has under this name, and its shape."""


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all tensors, by name."""
    return {name: tensor.shape for name, tensor in read_header(folder / "model.safetensors").items()}


@pytest.mark.parametrize("language", LANGUAGES)
def test_language_model(tmp_path: Path, language: str) -> None:
    folder = write_checkpoint(tmp_path, language=language)
    description = open_checkpoint(folder).description
    assert description.language_model == LANGUAGES[language].architecture
    assert (description.width, description.language_layers, description.vocabulary, description.context) == (128, 3, 373, 8192)
    assert description.thresholds is None
    tensor, shape = DISTINCTIVE_TENSORS[language]
    shapes = tensor_shapes(folder)
    assert shapes[f"language_model.{tensor}"] == shape
    assert all(name.startswith(("language_model.", "vision_model.", "mlp1.")) for name in shapes)


def test_internlm2_has_no_tensor_names_of_llama(tmp_path: Path) -> None:
    shapes = tensor_shapes(write_checkpoint(tmp_path, language="internlm2"))
    assert {"language_model.model.tok_embeddings.weight", "language_model.output.weight"} <= set(shapes)
    assert not any("embed_tokens" in name or "self_attn" in name or "lm_head" in name for name in shapes)


@pytest.mark.parametrize("tower", TOWERS)
def test_tower(tmp_path: Path, tower: str) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tower=tower, select_layer=-2, pixel_shuffle="v1"))
    description = checkpoint.description
    assert description.tower.select_layer == -2
    assert description.pixel_shuffle == "v1"
    assert (description.tower.norm, description.tower.qk_norm) == (
        ("layer_norm", False) if tower == "300m" else ("rms_norm", True)
    )
    layer_names = {name.removeprefix("vision_model.encoder.layers.0.") for name in checkpoint.vision_tensors}
    assert ("attn.q_norm.weight" in layer_names) is (tower == "6b")
    assert ("attn.qkv.bias" in layer_names) is (tower == "300m")
    assert ("norm1.bias" in layer_names) is (tower == "300m")


def test_flash(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, flash=True, relative_threshold=0.25, absolute_threshold=0.4))
    thresholds = checkpoint.description.thresholds
    assert thresholds is not None
    assert (thresholds.relative, thresholds.absolute) == (0.25, 0.4)
    assert checkpoint.description.compressed_tokens_per_tile == 64
    shapes = {name: tensor.shape for name, tensor in checkpoint.vision_tensors.items()}
    assert shapes["mlp2.1.weight"] == (256, 1024)
    assert shapes["pooling_before_gating.attn4.in_proj_weight"] == (192, 64)
    assert shapes["gating.block4.5.bias"] == (64,)
    assert shapes["gating.gate.1.weight"] == (2, 64)


def test_template(tmp_path: Path) -> None:
    assert open_checkpoint(write_checkpoint(tmp_path / "a", language="phi3")).description.template == "phi3-chat"
    assert open_checkpoint(write_checkpoint(tmp_path / "b", template="Hermes-2")).description.template == "Hermes-2"
    assert "<|im_end|>\\n" not in (tmp_path / "b" / "chat_template.jinja").read_text()


def test_a_text_chat_template_is_in_tokenizer_config_json(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, chat_template="text")
    assert not (folder / "chat_template.jinja").exists()
    assert "message['content']" in json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]


def test_dtype(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, dtype="bfloat16")
    assert {tensor.dtype for tensor in read_header(folder / "model.safetensors").values()} == {"BF16"}
    assert open_checkpoint(folder).description.dtype == "bfloat16"


def test_shards_hold_the_same_tensors(tmp_path: Path) -> None:
    whole, parts = write_checkpoint(tmp_path / "whole"), write_checkpoint(tmp_path / "parts", shards=3)
    files = sorted(parts.glob("model-*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert {n for file in files for n in read_header(file)} == set(tensor_shapes(whole))
    assert open_checkpoint(whole).fingerprint == open_checkpoint(parts).fingerprint


def test_the_seed_decides_the_fingerprint(tmp_path: Path) -> None:
    prints = {seed: open_checkpoint(write_checkpoint(tmp_path / str(seed), seed=seed)).fingerprint for seed in (0, 1)}
    assert prints[0] != prints[1]
    assert prints[0] == open_checkpoint(write_checkpoint(tmp_path / "again", seed=0)).fingerprint


def test_weights_keep_the_scale_of_activations(tmp_path: Path) -> None:
    tensors = load_file(write_checkpoint(tmp_path, flash=True) / "model.safetensors")
    for name in ("vision_model.encoder.layers.1.mlp.fc1.weight", "mlp1.1.weight", "mlp2.4.weight"):
        assert tensors[name].std().item() == pytest.approx(0.9 / math.sqrt(tensors[name].shape[1]), rel=0.05)
    assert (tensors["vision_model.encoder.layers.0.norm1.weight"] == 1).all()
    assert tensors["language_model.model.embed_tokens.weight"].std().item() == pytest.approx(1, rel=0.05)


def test_an_unknown_option_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="tiles"):
        write_checkpoint(tmp_path, tiles=3)


@pytest.mark.parametrize("tensor_names", ["hub", "module"])
@pytest.mark.parametrize("language", ["qwen2", "qwen3"])
def test_native(tmp_path: Path, language: str, tensor_names: str) -> None:
    pytest.importorskip("transformers")
    checkpoint = open_checkpoint(write_native_checkpoint(tmp_path, language=language, tensor_names=tensor_names))
    description, config = checkpoint.description, json.loads((tmp_path / "config.json").read_text())
    assert description.language_model == LANGUAGES[language].architecture
    assert (description.min_tiles, description.max_tiles, description.tokens_per_tile) == (1, 12, 256)
    assert config["image_token_id"] == IMAGE_TOKEN
    shapes = tensor_shapes(tmp_path)
    if tensor_names == "hub":
        assert {"vision_tower.embeddings.cls_token", "language_model.lm_head.weight"} <= set(shapes)
    else:
        assert {"model.vision_tower.embeddings.cls_token", "lm_head.weight"} <= set(shapes)
    renamed = {checkpoint.layout.vision_name(name) for name in checkpoint.vision_tensors}
    assert ("vision_model.encoder.layers.2.attn.qkv.weight", 2) in renamed
    assert None not in renamed
    assert "<IMG_CONTEXT>\\n" in (tmp_path / "chat_template.jinja").read_text()

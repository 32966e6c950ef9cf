"""The bundled checkpoint has the layout of the published InternVL3.5-Flash, and changes by decision only."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import GenerationConfig

from common.checkpoint import open_checkpoint, read_header
from demo.text.tokenizer import CHAT_TEMPLATE, DemoTokenizer
from tests.checkpoints import write_checkpoint

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "demo/checkpoint"
DECISION = ROOT / "docs/decisions/0019-the-bundled-checkpoint.md"


def without_layer_numbers(names: set[str]) -> set[str]:
    """Towers and language models differ in depth."""
    return {re.sub(r"layers\.\d+", "layers.N", name) for name in names}


def test_weights_are_those_of_the_last_decision() -> None:
    """Each version of the weights is in every clone for ever: see the page."""
    decided = re.findall(r"^\|.*`([0-9a-f]{64})`", DECISION.read_text(), re.MULTILINE)
    actual = hashlib.sha256((CHECKPOINT / "model.safetensors").read_bytes()).hexdigest()
    assert decided, f"{DECISION} names no sha256"
    assert actual == decided[-1], f"New weights need a line in {DECISION.relative_to(ROOT)}."


def test_it_has_exactly_the_tensors_of_the_layout(tmp_path: Path) -> None:
    reference = write_checkpoint(tmp_path, language="qwen3", flash=True)
    actual, expected = (read_header(folder / "model.safetensors") for folder in (CHECKPOINT, reference))
    assert without_layer_numbers(set(actual)) == without_layer_numbers(set(expected))
    assert {tensor.dtype for tensor in actual.values()} == {"BF16"}
    assert actual["vision_model.embeddings.position_embedding"].shape == (1, 1025, 192)


def test_description() -> None:
    description = open_checkpoint(CHECKPOINT).description
    assert (description.family, description.language_model) == ("InternVL 3.5 Flash", "Qwen3ForCausalLM")
    assert (description.min_tiles, description.max_tiles, description.thumbnail) == (1, 12, True)
    assert description.context == 8192
    assert (description.tower.image_size, description.tower.patch_size) == (448, 14)
    assert (description.tokens_per_tile, description.compressed_tokens_per_tile) == (256, 64)
    assert description.thresholds is not None
    assert json.loads((CHECKPOINT / "config.json").read_text())["llm_config"]["head_dim"] in (32, 64)


def test_it_is_smaller_than_24_megabytes() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 24_000_000


def test_tokenizer_and_template_are_those_of_training(tmp_path: Path) -> None:
    DemoTokenizer().save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for file in tmp_path.iterdir():
        assert (CHECKPOINT / file.name).read_bytes() == file.read_bytes(), file.name
    assert (CHECKPOINT / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_answers_are_greedy_by_default() -> None:
    """What vLLM takes as defaults of requests: the values that differ from those of transformers."""
    defaults = GenerationConfig.from_pretrained(CHECKPOINT).to_diff_dict()
    assert defaults["temperature"] == 0
    assert defaults["do_sample"] is False


@pytest.mark.parametrize("name", ["mlp1.3.weight", "mlp2.7.weight", "gating.gate.1.weight"])
def test_weights_are_finite_and_trained(name: str) -> None:
    tensor = load_file(CHECKPOINT / "model.safetensors")[name].float()
    assert tensor.isfinite().all()
    assert tensor.std() > 0

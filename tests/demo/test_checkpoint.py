"""The bundled checkpoint is laid out as the published InternVL3.5-Flash is, and small enough to ship."""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from common.checkpoint import open_checkpoint, read_header
from demo.words import TEMPLATE, Words
from tests.checkpoints import write_checkpoint

DEMO = Path(__file__).parents[2] / "demo/checkpoint"


def layered(names: set[str]) -> set[str]:
    """Without the layers' numbers: towers and language models differ in depth."""
    return {re.sub(r"layers\.\d+", "layers.N", name) for name in names}


def test_every_tensor_of_the_layout_and_no_other(tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path, language="qwen3", flash=True)
    found, expected = (read_header(folder / "model.safetensors") for folder in (DEMO, made))
    assert layered(set(found)) == layered(set(expected))
    assert {tensor.dtype for tensor in found.values()} == {"BF16"}
    assert found["vision_model.embeddings.position_embedding"].shape == (1, 1025, 192)


def test_what_it_says_of_itself() -> None:
    said = open_checkpoint(DEMO).description
    assert (said.family, said.language_model) == ("InternVL 3.5 Flash", "Qwen3ForCausalLM")
    assert (said.min_tiles, said.max_tiles, said.thumbnail, said.context) == (1, 12, True, 8192)
    assert (said.tower.image_size, said.tower.patch_size) == (448, 14)
    assert (said.tokens_per_tile, said.compressed_tokens_per_tile) == (256, 64)
    assert said.thresholds is not None
    assert json.loads((DEMO / "config.json").read_text())["llm_config"]["head_dim"] in (32, 64)


def test_size() -> None:
    assert sum(file.stat().st_size for file in DEMO.iterdir()) <= 24_000_000


def test_tokenizer_and_template_are_those_of_training(tmp_path: Path) -> None:
    Words().save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for file in tmp_path.iterdir():
        assert (DEMO / file.name).read_bytes() == file.read_bytes(), file.name
    assert (DEMO / "chat_template.jinja").read_text() == TEMPLATE


@pytest.mark.parametrize("part", ["mlp1.3.weight", "mlp2.7.weight", "gating.gate.1.weight"])
def test_it_is_trained(part: str) -> None:
    tensor = load_file(DEMO / "model.safetensors")[part].float()
    assert tensor.isfinite().all()
    assert tensor.std() > 0

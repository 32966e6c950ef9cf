"""The trained model equals the model that is served."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from demo.batches.conversations import conversation_batch
from demo.batches.types import ConversationRows
from demo.model.config import LANGUAGE_WIDTH
from demo.model.demo_model import DemoModel
from demo.model.export import write_checkpoint
from demo.scenes.style import Style
from demo.text.tokenizer import DemoTokenizer

TINY = Style(tile_pixels=112, min_digit_pixels=16)


def separate_logits(model: DemoModel, prefixes: Tensor, rows: ConversationRows) -> Tensor:
    """Logits of the answers, each conversation computed by itself from the start of its prefix."""
    logits = []
    for row in range(len(rows.ids)):
        for index in sorted(set(rows.conversations[row].tolist()) - {-1}):
            own = rows.conversations[row] == index
            embeddings = torch.cat([prefixes[row], model.embed(rows.ids[row][own])])[None]
            hidden = model.language.model(inputs_embeds=embeddings).last_hidden_state[0, prefixes.shape[1] :]
            logits.append(model.language.lm_head(hidden[rows.labels[row][own] >= 0]))
    return torch.cat(logits)


@pytest.mark.parametrize("seed", range(4))
def test_packed_conversations_equal_separate_ones(model: DemoModel, tokenizer: DemoTokenizer, seed: int) -> None:
    batch = conversation_batch(np.random.default_rng(seed), tokenizer, TINY, 8)
    prefixes = model.build_prefixes(batch, model.forward(batch.tiles, batch.crop_origins), batch.compressed)
    packed = model.answer_logits(model.encode_prefixes(prefixes), batch.rows)
    assert packed.shape == (len(batch.rows.answer_ids), tokenizer.size)
    assert torch.allclose(packed, separate_logits(model, prefixes, batch.rows), atol=1e-4)
    texts = model.answer_logits(None, batch.text_rows)
    assert torch.allclose(texts, separate_logits(model, torch.zeros(1, 0, LANGUAGE_WIDTH), batch.text_rows), atol=1e-4)


def test_full_tile_has_the_features_of_the_vision_worker(model: DemoModel) -> None:
    tiles = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 448, 448, 3), np.uint8))
    origins = torch.zeros(2, 2, dtype=torch.long)
    assert torch.allclose(model.forward(tiles, origins), model.forward(tiles), atol=1e-5)


def test_checkpoint_contains_the_trained_weights(model: DemoModel, tokenizer: DemoTokenizer, tmp_path: Path) -> None:
    write_checkpoint(model, tokenizer, tmp_path, 0.25, 0.75)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    for name, tensor in (*model.vision.state_dict().items(), *model.language.state_dict().items()):
        stored = tensors.get(name, tensors.get(f"language_model.{name}"))
        assert stored is not None, name
        assert torch.equal(stored, tensor.bfloat16()), name
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["flash_relative_threshold"], config["flash_absolute_threshold"]) == (0.25, 0.75)

"""What is trained is what is served."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from demo import batches, model
from demo.scenes import Style
from demo.words import Words

SMALL = Style(tile=112, smallest_digit=16)


def alone(trainee: model.Trainee, prefix: Tensor, rows: batches.Rows) -> Tensor:
    """Logits of each conversation read from the beginning, by itself."""
    found = []
    for sequence in range(len(rows.ids)):
        for number in sorted(set(rows.numbers[sequence].tolist()) - {-1}):
            here = rows.numbers[sequence] == number
            whole = torch.cat([prefix[sequence], trainee.embed(rows.ids[sequence][here])])[None]
            hidden = trainee.language.model(inputs_embeds=whole).last_hidden_state[0, prefix.shape[1] :]
            found.append(trainee.language.lm_head(hidden[rows.answers[sequence][here] >= 0]))
    return torch.cat(found)


@pytest.mark.parametrize("seed", range(4))
def test_conversations_side_by_side_are_as_each_alone(trainee: model.Trainee, words: Words, seed: int) -> None:
    talk = batches.talk(np.random.default_rng(seed), words, SMALL, 8)
    prefix = trainee.prefixes(talk, trainee.forward(talk.tiles, talk.corners), talk.compressed)
    together = trainee.answer(trainee.read(prefix), talk.rows)
    assert together.shape == (len(talk.rows.told), words.size)
    assert torch.allclose(together, alone(trainee, prefix, talk.rows), atol=1e-4)
    texts = trainee.answer(None, talk.texts)
    assert torch.allclose(texts, alone(trainee, torch.zeros(1, 0, model.HIDDEN), talk.texts), atol=1e-4)


def test_a_full_tile_is_seen_as_the_vision_worker_sees_it(trainee: model.Trainee) -> None:
    tiles = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 448, 448, 3), np.uint8))
    corner = torch.zeros(2, 2, dtype=torch.long)
    assert torch.allclose(trainee.forward(tiles, corner), trainee.forward(tiles), atol=1e-5)


def test_the_checkpoint_holds_what_was_trained(trainee: model.Trainee, words: Words, tmp_path: Path) -> None:
    model.write(trainee, words, tmp_path, 0.25, 0.75)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    for name, tensor in (*trainee.vision.state_dict().items(), *trainee.language.state_dict().items()):
        stored = tensors.get(name, tensors.get(f"language_model.{name}"))
        assert stored is not None, name
        assert torch.equal(stored, tensor.bfloat16()), name
    said = json.loads((tmp_path / "config.json").read_text())
    assert (said["flash_relative_threshold"], said["flash_absolute_threshold"]) == (0.25, 0.75)

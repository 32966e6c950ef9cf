"""The last layer learns from what was gathered of it, and nothing before it moves."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from demo import batches, settling
from demo.model import Trainee
from demo.scenes import Style
from demo.words import Words


@pytest.fixture
def batch(words: Words) -> batches.Talk:
    style = Style(tile=224, smallest_digit=28, drill=True)
    drawn = batches.talk(np.random.default_rng(1), words, style, 6, sizes=(2,), pairs=0, extras=0)
    drawn.compressed.fill_(True)
    assert "count" in drawn.tasks
    assert set(drawn.tasks) != {"count"}
    return drawn


def test_what_is_gathered_is_what_the_last_layer_answers_from_by_either_path(trainee: Trainee, batch: batches.Talk) -> None:
    found = settling.gathered(trainee, batch)
    with torch.no_grad():
        loss, _ = settling.settle(trainee, found)[1](torch.arange(len(found.told)))
        features = trainee.forward(batch.tiles, batch.corners)
        paths = (batch.compressed, torch.zeros_like(batch.compressed))
        logits = [trainee.answer(trainee.read(trainee.prefixes(batch, features, path)), batch.rows) for path in paths]
    counts = [batch.tasks[n] == "count" for n in batch.rows.numbers[batch.rows.answers >= 0]]
    assert found.weights.tolist() == 2 * [3.0 if count else 1.0 for count in counts]
    each = F.cross_entropy(torch.cat(logits), batch.rows.told.repeat(2), reduction="none")
    assert float(loss) == pytest.approx(float((each * found.weights).sum() / found.weights.sum()), rel=1e-3)


def test_it_answers_better_and_the_rest_stays(trainee: Trainee, batch: batches.Talk) -> None:
    model = copy.deepcopy(trainee).requires_grad_(True)
    found = settling.gathered(model, batch)
    parameters, step = settling.settle(model, found)
    optimiser = torch.optim.AdamW(parameters, lr=1e-3)
    losses = []
    for _ in range(30):
        loss, _ = step(torch.arange(len(found.told)))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    before, after = trainee.state_dict(), model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    last = f"language.model.layers.{len(model.language.model.layers) - 1}."
    kinds = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm")
    assert moved == {"language.model.norm.weight", *(f"{last}{kind}.weight" for kind in kinds)}

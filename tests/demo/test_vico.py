"""The short path learns from the long one; the router learns what is at stake, not what was chance when costs were judged."""

import numpy as np
import pytest
import torch

from demo import batches, vico
from demo.looking import Looking
from demo.model import WIDTH, Trainee
from demo.scenes import Style
from demo.words import Words


def judged(count: int, seed: int) -> tuple[vico.Judged, torch.Tensor]:
    """Tiles of which some hold something: compressing those doubles the loss; of the others the cost is chance."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 16, WIDTH, generator=generator) * 0.3
    holds = torch.rand(count, generator=generator) < 0.2
    features[holds, 5, :20] += 3.0
    chance = 1 + 0.02 * torch.randn(count, generator=generator)
    return vico.Judged(features.half(), torch.where(holds, 2 * chance, chance)), holds


def test_the_router_keeps_what_is_costly_among_tiles_it_has_not_seen() -> None:
    torch.manual_seed(0)
    model = Trainee(Words())
    step = vico.router(model, judged(150, 1)[0], share=0.5)
    parameters = [*model.vision.pooling_before_gating.parameters(), *model.vision.gating.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=5e-4)
    for number in range(60):
        loss, _ = step(torch.arange(48) * (number + 1) % 150)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    fresh, holds = judged(60, 2)
    with torch.no_grad():
        features = fresh.features.float()
        kept = model.vision.gating(model.vision.pooling_before_gating(features)).softmax(-1)[:, 1]
    assert kept[holds].min() > kept[~holds].max()
    assert kept[~holds].mean() < 0.5 < kept[holds].mean()


def test_the_short_path_is_held_to_the_long_ones_answers_and_to_where_it_looks(trainee: Trainee, words: Words) -> None:
    attentions = Looking(trainee)
    step = vico.consistency(trainee, attentions)
    style = Style(tile=224, smallest_digit=28, drill=True)
    batch = batches.talk(np.random.default_rng(1), words, style, 6, sizes=(2,), pairs=0, extras=0)
    batch.compressed.fill_(False)
    total, shown = step(batch)
    assert shown["kl long"] == pytest.approx(0, abs=1e-5), "the same model, the same path"
    assert 0 < shown["finds counts 1.2"] < 1
    assert float(total.detach()) > 0.3 * shown["answers long"] + 0.1, "an untrained attention looks anywhere"
    batch.compressed.fill_(True)
    assert step(batch)[1]["kl short"] > 1e-4
    attentions.close()

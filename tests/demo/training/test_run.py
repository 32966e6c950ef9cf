import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from demo.training.run import Stage, TrainingRun, _schedule
from demo.training.stages import STAGES


def random_batch(rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.random(4).astype(np.float32))


def train(run: TrainingRun, stage: Stage, step: Callable[[Any], Any] | None = None) -> None:
    """Train one small layer of the heads."""
    layer = run.heads.difference

    def default_step(batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        loss = (layer.weight.sum() - batch.sum()) ** 2
        return loss, {"loss": float(loss.detach())}

    run.train(stage, random_batch, step or default_step, [{"params": [*layer.parameters()]}])


STAGE = Stage("a_stage", 130, 1e-3, train)


class Interrupt(Exception):
    """Stands for ctrl-C."""


def test_interrupted_run_resumes_and_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = TrainingRun(tmp_path / "whole", 1, 0)
    STAGE.train(whole, STAGE)
    interrupted = TrainingRun(tmp_path / "interrupted", 1, 0)
    layer, steps = interrupted.heads.difference, 0

    def step(batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        nonlocal steps
        steps += 1
        if steps == 111:
            raise Interrupt
        loss = (layer.weight.sum() - batch.sum()) ** 2
        return loss, {"loss": float(loss.detach())}

    with pytest.raises(Interrupt):
        train(interrupted, STAGE, step)
    resumed = TrainingRun(tmp_path / "interrupted", 1, 0)
    assert resumed.steps_done == {"a_stage": 100}, "the state is saved every 100 steps"
    assert not resumed.is_done(STAGE)
    STAGE.train(resumed, STAGE)
    assert resumed.is_done(STAGE)
    assert torch.equal(resumed.heads.difference.weight, whole.heads.difference.weight)
    log = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [20, 40, 60, 80, 100, 120, 130]


@dataclass
class Sums:
    values: Tensor


def test_collected_files_are_not_made_again(tmp_path: Path) -> None:
    run = TrainingRun(tmp_path, 1, 0)
    stage = Stage("collected", 40, 0, train)
    indices: list[int] = []

    def process(batch: Tensor, index: int) -> Sums:
        indices.append(index)
        return Sums(batch.sum()[None])

    run.collect(stage, random_batch, process)
    assert indices == list(range(40))
    values = run.load_collected("collected").values
    assert len(values) == 40
    (tmp_path / "collected-0001.pt").unlink()
    indices.clear()
    run.collect(stage, random_batch, process)
    assert indices == list(range(20, 40))
    assert torch.equal(run.load_collected("collected").values, values)


def test_stages_are_numbered_and_need_whole_files() -> None:
    assert [stage.name[:2] for stage in STAGES] == [f"{i:02}" for i in range(1, len(STAGES) + 1)]
    assert all(stage.steps % 20 == 0 for stage in STAGES if stage.learning_rate == 0)


def test_learning_rate_rises_then_falls_to_a_twentieth() -> None:
    rates = [_schedule(step, 1000) for step in range(1000)]
    assert rates[0] == 0.01
    assert max(rates) == rates[99] == 1.0
    assert rates[99:] == sorted(rates[99:], reverse=True)
    assert 0.05 <= rates[-1] < 0.051

"""A training run: model, optimisation, progress and files. It can be stopped and resumed at any time."""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from demo.batches.loading import StepBatches, load_batches, to_device
from demo.model.demo_model import DemoModel, is_bfloat16_faster
from demo.text.tokenizer import DemoTokenizer
from demo.training.patch_heads import PatchHeads

Step = Callable[[Any], tuple[Tensor, dict[str, float]]]
"""Takes a batch; returns the loss and figures for the log."""

_LOG_INTERVAL_STEPS = 20
_SAVE_INTERVAL_STEPS = 100
_BATCHES_PER_FILE = 20
_MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        name: Unique. It is part of the seed of the stage's batches and of the names of its files.
        steps: Number of batches.
        learning_rate: Peak learning rate; 0 for stages that only collect data.
        train: Runs the stage.
    """

    name: str
    steps: int
    learning_rate: float
    train: Callable[["TrainingRun", "Stage"], None]


class TrainingRun:
    """State of a run and its folder: `latest.pt` to resume from, `log.jsonl` with a line every 20 steps.

    Attributes:
        steps_done: Steps of each stage that are done, by stage name.
        seconds: Time spent in training steps, over all restarts.
    """

    def __init__(self, folder: Path, seed: int, workers: int) -> None:
        """Create a run, or resume the one in `folder`.

        Args:
            folder: Folder of the run's files; it is created.
            seed: Seed of weights and batches.
            workers: Processes that make batches; 0 for none.
        """
        self.folder, self.seed, self.workers = folder, seed, workers
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(seed)
        self.tokenizer = DemoTokenizer()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = DemoModel(self.tokenizer).to(self.device)
        self.model.use_bfloat16 = is_bfloat16_faster(self.device)
        self.heads = PatchHeads().to(self.device)
        self.steps_done: dict[str, int] = {}
        self.seconds = 0.0
        self._optimiser_state: dict[str, Any] = {}
        latest = folder / "latest.pt"
        if latest.exists():
            self._restore(torch.load(latest, map_location=self.device, weights_only=False))

    def is_done(self, stage: Stage) -> bool:
        """Whether all steps of a stage are done."""
        return self.steps_done.get(stage.name, 0) >= stage.steps

    def train(self, stage: Stage, make_batch: Any, step: Step, parameters: list[dict[str, Any]]) -> None:
        """Run `step` on every batch of a stage that is not done yet.

        Args:
            stage: The stage.
            make_batch: Takes a generator and returns a batch.
            step: Computes the loss of a batch.
            parameters: Parameter groups of the optimiser. A group's `rate_factor` multiplies its learning rate.
        """
        first = self.steps_done.get(stage.name, 0)
        optimiser = torch.optim.AdamW(parameters, lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
        factors = [group.get("rate_factor", 1.0) for group in optimiser.param_groups]
        if first:
            optimiser.load_state_dict(self._optimiser_state)
        all_parameters = [p for group in parameters for p in group["params"]]
        batches = load_batches(StepBatches(make_batch, self.seed, stage.name, first, stage.steps), self.workers)
        sums: dict[str, list[float]] = {}
        start = last = time.monotonic()
        for index in range(first, stage.steps):
            rate = stage.learning_rate * _schedule(index, stage.steps)
            loss, figures = step(to_device(next(batches), self.device))
            loss.backward()  # type: ignore[no-untyped-call]
            figures["gradient"] = float(nn.utils.clip_grad_norm_(all_parameters, _MAX_GRADIENT_NORM))
            for group, factor in zip(optimiser.param_groups, factors, strict=True):
                group["lr"] = rate * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            now = time.monotonic()
            self.seconds += now - last
            last = now
            for name, value in figures.items():
                sums.setdefault(name, []).append(value)
            done = self.steps_done[stage.name] = index + 1
            if done % _LOG_INTERVAL_STEPS == 0 or done == stage.steps:
                means = {name: _mean(values) for name, values in sums.items()}
                self._log(stage, means, rate, (now - start) / (done - first))
                sums = {}
            if done % _SAVE_INTERVAL_STEPS == 0 or done == stage.steps:
                self._save(optimiser)

    def collect(self, stage: Stage, make_batch: Any, process: Callable[[Any, int], Any]) -> None:
        """Store the results of `process(batch, index)` for every batch of a stage, 20 batches to a file.

        Files that exist are not made again. `stage.steps` is a multiple of 20; results are dataclasses of tensors.
        """
        files = [self.folder / f"{stage.name}-{part:04}.pt" for part in range(stage.steps // _BATCHES_PER_FILE)]
        first = _BATCHES_PER_FILE * sum(file.exists() for file in files)
        batches = load_batches(StepBatches(make_batch, self.seed, stage.name, first, stage.steps), self.workers)
        start = time.monotonic()
        for file in files[first // _BATCHES_PER_FILE :]:
            indices = range(first, first + _BATCHES_PER_FILE)
            results = [process(to_device(next(batches), self.device), index) for index in indices]
            _save_atomically(file, _concatenate(results))
            first = self.steps_done[stage.name] = first + _BATCHES_PER_FILE
            self._log(stage, {}, 0, (time.monotonic() - start) / _BATCHES_PER_FILE)
            start = time.monotonic()
        self.steps_done[stage.name] = first

    def load_collected(self, stage_name: str) -> Any:
        """Return everything that a stage has collected, as one dataclass."""
        files = sorted(self.folder.glob(f"{stage_name}-*.pt"))
        return _concatenate([torch.load(file, weights_only=False) for file in files])

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.steps_done, self.seconds = state["steps_done"], state["seconds"]
        self._optimiser_state = state["optimiser"]

    def _save(self, optimiser: torch.optim.Optimizer) -> None:
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "steps_done": self.steps_done,
            "seconds": self.seconds,
            "optimiser": optimiser.state_dict(),
        }
        _save_atomically(self.folder / "latest.pt", state)

    def _log(self, stage: Stage, figures: dict[str, float], rate: float, step_seconds: float) -> None:
        done = self.steps_done[stage.name]
        line = {"stage": stage.name, "step": done, "seconds": round(self.seconds), "rate": rate}
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line | {name: round(value, 4) for name, value in figures.items()}) + "\n")
        minutes = (stage.steps - done) * step_seconds / 60
        text = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
        print(f"{stage.name} {done}/{stage.steps}  {minutes:.0f} min left  {step_seconds:.2f} s/step  {text}", flush=True)


def _save_atomically(file: Path, value: Any) -> None:
    torch.save(value, file.with_suffix(".new"))
    os.replace(file.with_suffix(".new"), file)


def _concatenate(parts: list[Any]) -> Any:
    """Concatenate dataclasses of tensors field by field."""
    return type(parts[0])(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(parts[0])))


def _mean(values: list[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else float("nan")


def _schedule(step: int, steps: int) -> float:
    """Learning rate as a fraction of its peak: linear warm-up over at most 100 steps, then a cosine to 0.05."""
    warmup = min(100, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

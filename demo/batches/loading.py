"""Loading of batches: a batch depends only on the seed, the stage and the step, so that a run can be resumed."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class StepBatches(Dataset[Any]):
    """The batches of one stage from step `first` on. `make(rng)` returns one batch."""

    def __init__(self, make: Any, seed: int, stage: str, first: int, steps: int) -> None:
        self.make, self.seed, self.stage, self.first, self.steps = make, seed, stage, first, steps

    def __len__(self) -> int:
        return self.steps - self.first

    def __getitem__(self, index: int) -> Any:
        torch.set_num_threads(1)
        stage = int.from_bytes(self.stage.encode(), "little") % 2**32
        return self.make(np.random.default_rng([self.seed, stage, self.first + index]))


def load_batches(batches: StepBatches, workers: int) -> Iterator[Any]:
    """Iterate over the batches in order. They are made in `workers` processes, or here if that is 0."""
    return iter(DataLoader(batches, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None))


def to_device(value: Any, device: torch.device) -> Any:
    """Return a batch with all its tensors on the device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{part.name: to_device(getattr(value, part.name), device) for part in fields(value)})
    return value

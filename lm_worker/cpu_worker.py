"""vLLM's worker on a CPU, for requests with a seed that are prefilled in parts.

After each part but the last, vLLM discards the token that was sampled, and sets the offset of the request's random generator
back. A generator on a CPU has no offset: vLLM 0.32 raises, and its engine ends. Here its state is restored instead.
"""

from typing import Any

import numpy as np
import torch
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker


class SeededModelRunner(CPUModelRunner):
    """A model runner whose generators are as if no token had been discarded."""

    def _sample(self, *arguments: Any, **more: Any) -> Any:
        self._states = {i: generator.get_state() for i, generator in self._generators_of_discarded().items()}
        return super()._sample(*arguments, **more)

    def _bookkeeping_sync(self, *arguments: Any, **more: Any) -> Any:
        generators = self._generators_of_discarded()
        for i, generator in generators.items():
            if i in self._states:
                generator.set_state(self._states[i])
            del self.input_batch.generators[i]  # where vLLM would set its offset
        try:
            return super()._bookkeeping_sync(*arguments, **more)
        finally:
            self.input_batch.generators.update(generators)

    def _generators_of_discarded(self) -> dict[int, torch.Generator]:
        """The generators of requests whose token is discarded in this step, by their index in the batch."""
        mask = self.discard_request_mask.np[: self.input_batch.num_reqs]
        generators = self.input_batch.generators
        return {int(i): generators[int(i)] for i in np.nonzero(mask)[0] if int(i) in generators}


class SeededWorker(CPUWorker):
    """A worker with that model runner: the value of vLLM's `--worker-cls`."""

    def init_device(self) -> None:
        """See vLLM."""
        super().init_device()
        if type(self.model_runner) is CPUModelRunner:
            self.model_runner.__class__ = SeededModelRunner

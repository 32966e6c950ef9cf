"""Assignment of one machine's GPUs, or of its cores, to its workers."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

_DEVICE_FOLDER = Path("/dev")
_BINDING = "VLLM_CPU_OMP_THREADS_BIND"


@dataclass(frozen=True)
class Devices:
    """GPUs of each vision and each language worker, as named in CUDA_VISIBLE_DEVICES; empty on a machine without GPUs."""

    vision: list[list[str]]
    language: list[list[str]]
    shared: bool
    """Whether several workers may share a GPU."""

    def environment(self, gpus: list[str]) -> dict[str, str]:
        """Return the variables of a worker with these GPUs."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}

    def language_environment(self, number: int) -> dict[str, str]:
        """Return the variables of a language worker: its GPUs, or without any its share of the cores.

        vLLM binds its threads on a CPU to all cores but one. Two that are bound to the same cores starve each other.
        """
        count, cores = len(self.language), sorted(os.sched_getaffinity(0))
        if self.language[number] or count == 1 or len(cores) < count or _BINDING in os.environ:
            return self.environment(self.language[number])
        share = cores[number * len(cores) // count : (number + 1) * len(cores) // count]
        return {_BINDING: ",".join(map(str, share))}

    def vllm_flags(self) -> list[str]:
        """Return vLLM flags that leave memory for a vision tower on the same GPU. Later flags of the user override them."""
        return ["--gpu-memory-utilization=0.7"] if self.shared else []


def assign(vision: int, language: int, gpus: list[str] | None = None) -> Devices:
    """Assign the last GPUs, one each, to vision workers and the others in equal shares to language workers.

    With fewer GPUs than workers, workers share them round-robin.

    Args:
        vision: number of vision workers.
        language: number of language workers.
        gpus: the GPUs; None: those visible to this process.
    """
    gpus = visible_gpus() if gpus is None else gpus
    if len(gpus) < vision + language:
        return Devices(_round_robin(gpus, vision), _round_robin(gpus, language), shared=bool(gpus))
    for_language = gpus[: len(gpus) - vision]
    share = len(for_language) // language
    return Devices(
        vision=[[gpu] for gpu in gpus[len(for_language) :]],
        language=[for_language[i * share : (i + 1) * share] for i in range(language)],
        shared=False,
    )


def _round_robin(gpus: list[str], workers: int) -> list[list[str]]:
    return [[gpus[i % len(gpus)]] if gpus else [] for i in range(workers)]


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, by CUDA_VISIBLE_DEVICES or else by the device files."""
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    if variable is not None:
        return [part.strip() for part in variable.split(",") if part.strip() and part.strip() != "-1"]
    return sorted(n.removeprefix("nvidia") for n in os.listdir(_DEVICE_FOLDER) if re.fullmatch(r"nvidia\d+", n))

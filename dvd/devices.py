"""Which GPUs of one machine go to which worker."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

_DEVICES = Path("/dev")


@dataclass(frozen=True)
class Devices:
    """GPU numbers for each vision and each language worker; empty where the machine has none."""

    vision: list[list[str]]
    language: list[list[str]]
    shared: bool

    def environment(self, gpus: list[str]) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}

    def vllm_flags(self) -> list[str]:
        # both kinds of worker on one GPU: leave the tower room; a later flag of the caller's overrides this one
        return ["--gpu-memory-utilization=0.7"] if self.shared else []


def assign(vision: int, language: int, gpus: list[str] | None = None) -> Devices:
    """The last GPUs, one each, to vision workers, the others in equal shares to language workers; where there are too
    few for that, workers share them in turn.
    """
    gpus = visible() if gpus is None else gpus
    if len(gpus) < vision + language:
        return Devices(_in_turn(gpus, vision), _in_turn(gpus, language), shared=bool(gpus))
    rest = gpus[: len(gpus) - vision]
    share = len(rest) // language
    return Devices(
        vision=[[gpu] for gpu in gpus[len(rest) :]],
        language=[rest[i * share : (i + 1) * share] for i in range(language)],
        shared=False,
    )


def _in_turn(gpus: list[str], workers: int) -> list[list[str]]:
    return [[gpus[i % len(gpus)]] if gpus else [] for i in range(workers)]


def visible() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [part.strip() for part in named.split(",") if part.strip() and part.strip() != "-1"]
    return sorted(n.removeprefix("nvidia") for n in os.listdir(_DEVICES) if re.fullmatch(r"nvidia\d+", n))

"""What the official implementation gave for a few images on three tiny checkpoints; `*.embeds.sample` is every 16th row."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from common.checkpoint import open_checkpoint
from common.tiling import Tiling
from vision_worker.encoder import GroupEmbedding, Placement
from vision_worker.models import internvl, vir
from vision_worker.models.internvl import InternVL
from vision_worker.preprocessing.tiling import Tiles

FOLDER = Path(__file__).parents[1] / "data/golden"
NAMES = ("flash-qwen3", "vit300m-qwen2", "vit6b-llama")
SAMPLE = 16


@dataclass(frozen=True)
class Case:
    """One request of the official implementation."""

    checkpoint: str
    said: dict[str, Any]

    @property
    def stems(self) -> list[str]:
        return [Path(name).stem for name in self.said["images"]]

    @property
    def id(self) -> str:
        return f"{self.checkpoint}:{'+'.join(self.stems)}"

    def embeds(self, image: int) -> torch.Tensor | None:
        stem = "+".join(self.stems) + (f".{image}" if len(self.stems) > 1 else "")
        return expected(self.checkpoint).get(f"{stem}.embeds.sample")


@functools.cache
def expected(name: str) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / name / "expected.safetensors")


def cases(*names: str) -> list[Case]:
    found = [Case(name, said) for name in names for said in json.loads((FOLDER / name / "cases.json").read_text())]
    return [case for case in found if case.said["images"]]


@functools.cache
def encoder(name: str, dtype: torch.dtype = torch.float32) -> InternVL:
    return internvl.load(open_checkpoint(FOLDER / name / "checkpoint"), Placement(torch.device("cpu"), dtype))


def image(name: str) -> bytes:
    return (FOLDER / "images" / name).read_bytes()


def tiling(of: InternVL) -> Tiling:
    said = of.checkpoint.description
    return Tiling(said.min_tiles, said.max_tiles, said.thumbnail, said.tower.image_size)


def tiles(of: InternVL, name: str) -> Tiles:
    return of.prepare(image(name), tiling(of))


@functools.cache
def features(name: str, file: str, dtype: torch.dtype) -> torch.Tensor:
    """Of one image; kept, since several cases hold the same image."""
    made = encoder(name, dtype)
    return made.forward(made.stage(tiles(made, file).pixels))


def embedded(case: Case, dtype: torch.dtype) -> GroupEmbedding:
    made = encoder(case.checkpoint, dtype)
    seen = torch.cat([features(case.checkpoint, file, dtype) for file in case.said["images"]])
    return made.project(seen, range(len(seen)), vir.policy(0, made.checkpoint.description.thresholds))


def by_image(case: Case, result: GroupEmbedding) -> list[torch.Tensor]:
    counts = case.said["num_tiles"]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [torch.cat(result.blocks[start : start + count]) for start, count in zip(starts, counts, strict=True)]


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())

"""Results of the official implementation for a few images on three tiny checkpoints.

`*.embeds.sample` in `expected.safetensors` is every `SAMPLE_STRIDE`th row of an embedding.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from common.checkpoint import open_checkpoint
from common.tiling import Tiling
from tests.vision_worker.images import pixels
from vision_worker.encoder import Encoder, FeatureGroup, GroupEmbedding, Placement
from vision_worker.models import internvl, vir
from vision_worker.models.internvl import InternVL
from vision_worker.preprocessing.tiling import Tiles

FOLDER = Path(__file__).parents[1] / "data/golden"
NAMES = ("flash-qwen3", "vit300m-qwen2", "vit6b-llama")
SAMPLE_STRIDE = 16


@dataclass(frozen=True)
class Case:
    """One request to the official implementation; `fields` are its entry in `cases.json`."""

    checkpoint: str
    fields: dict[str, Any]

    @property
    def stems(self) -> list[str]:
        return [Path(name).stem for name in self.fields["images"]]

    @property
    def id(self) -> str:
        return f"{self.checkpoint}:{'+'.join(self.stems)}"

    def sampled_embedding(self, image: int) -> torch.Tensor | None:
        """Every `SAMPLE_STRIDE`th row of an image's embedding, where it is recorded."""
        stem = "+".join(self.stems) + (f".{image}" if len(self.stems) > 1 else "")
        return expected(self.checkpoint).get(f"{stem}.embeds.sample")


@functools.cache
def expected(name: str) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / name / "expected.safetensors")


def cases(*names: str) -> list[Case]:
    """All cases with images of these checkpoints."""
    entries = [Case(name, fields) for name in names for fields in json.loads((FOLDER / name / "cases.json").read_text())]
    return [case for case in entries if case.fields["images"]]


@functools.cache
def encoder(name: str, dtype: torch.dtype = torch.float32) -> InternVL:
    return internvl.load(open_checkpoint(FOLDER / name / "checkpoint"), Placement(torch.device("cpu"), dtype))


def image(name: str) -> bytes:
    return (FOLDER / "images" / name).read_bytes()


def tiling(encoder: Encoder) -> Tiling:
    """The checkpoint's own tiling."""
    description = encoder.checkpoint.description
    return Tiling(description.min_tiles, description.max_tiles, description.thumbnail, description.tower.image_size)


def tiles(encoder: Encoder, name: str) -> Tiles:
    return encoder.prepare(pixels(image(name)), tiling(encoder))


@functools.cache
def features(name: str, file: str, dtype: torch.dtype) -> torch.Tensor:
    """Features of one image; cached, since several cases have the same image."""
    model = encoder(name, dtype)
    return model.forward(model.stage(list(tiles(model, file).pixels)))


def embed(case: Case, dtype: torch.dtype) -> GroupEmbedding:
    """Encode a case's images as one group, with the learned router."""
    model = encoder(case.checkpoint, dtype)
    group = torch.cat([features(case.checkpoint, file, dtype) for file in case.fields["images"]])
    return project(model, group, range(len(group)), vir.select_policy(0, model.checkpoint.description.thresholds))


def project(encoder: Encoder, features: torch.Tensor, index: Sequence[int], policy: vir.Policy) -> GroupEmbedding:
    """Project one group alone."""
    return encoder.project([FeatureGroup(features, index, policy)])[0]


def split_by_image(case: Case, result: GroupEmbedding) -> list[torch.Tensor]:
    counts = case.fields["num_tiles"]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [torch.cat(result.blocks[start : start + count]) for start, count in zip(starts, counts, strict=True)]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((actual.float() - expected.float()).norm() / expected.float().norm())

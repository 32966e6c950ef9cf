"""Every language model that a family uses boots and answers images, decoupled; what cannot run here says so by name.

The vision worker's own code encodes, the sink's own store holds, vLLM's own engine answers with our model class and
connector. The whole road through HTTP is what the golden checkpoints (Qwen2, Qwen3, Llama) go.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint import open_checkpoint
from common.embedding import Header
from common.options import read_options
from common.tiling import Tiling
from lm_worker.shared_memory import create_folder
from lm_worker.store import Store
from tests import checkpoints
from tests.e2e.serving import IMAGES, ROOT, text_part
from vision_worker import encoder as encoders
from vision_worker.config import VisionOptions
from vision_worker.models import vir

PICTURES = ("square.png", "palette_512x512.png", "wide_1300x800.jpg")


@dataclass(frozen=True)
class Family:
    """One checkpoint to make and serve."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


FAMILIES = [
    Family("qwen2-text-template", {"language": "qwen2", "chat_template": "text"}),
    Family("qwen3-flash-6b", {"language": "qwen3", "flash": True, "tower": "6b"}),
    Family("qwen3-moe-flash", {"language": "qwen3_moe", "flash": True}),
    Family("llama", {"language": "llama", "tower": "6b", "pixel_shuffle": "v1"}),
    Family("internlm2", {"language": "internlm2", "tower": "6b", "pixel_shuffle": "v1", "chat_template": "text"}),
    Family("internlm3", {"language": "internlm3"}),
    Family("phi3", {"language": "phi3", "select_layer": -2, "chat_template": "text"}),
    Family("gpt-oss", {"language": "gpt_oss"}),
    Family("native-qwen2", {"language": "qwen2"}),
    Family("native-qwen3", {"language": "qwen3", "spelling": "module"}),
]


def embed(checkpoint: Path, store: Path) -> dict[str, int]:
    """Encode the pictures into the store, each under its name; visual tokens of each."""
    opened = open_checkpoint(checkpoint)
    said = opened.description
    encoder = encoders.load(read_options(VisionOptions, [str(checkpoint)], {}), opened)
    create_folder(store)
    kept = Store(store, budget=64 << 20, lease=0)
    rows = {}
    for picture in PICTURES:
        tiles = encoder.prepare((IMAGES / picture).read_bytes(), Tiling(1, 2, said.thumbnail))
        policy = vir.select_policy(0, said.thresholds)
        values = torch.cat(
            encoder.project(encoder.forward(encoder.stage(tiles.pixels)), range(len(tiles)), policy).blocks
        ).float()
        key = picture.partition(".")[0]
        rows[key] = len(values)
        with kept.writing(Header(key, opened.fingerprint, "float32", *values.shape)) as incoming:
            incoming.add(values.contiguous().numpy().tobytes())
    return rows


def conversation(parts: Sequence[str], rows: dict[str, int]) -> list[dict[str, Any]]:
    """One user message; a part that is the name of a picture stands for it."""
    images = {
        key: {"type": "image_embeds", "image_embeds": {"image_num_tokens": [count]}, "uuid": key} for key, count in rows.items()
    }
    return [{"role": "user", "content": [images.get(part) or text_part(part) for part in parts]}]


QUESTIONS = [
    ["what is shown?"],
    ["square", "what is shown?"],
    ["palette_512x512", "what is shown?"],
    ["Image-1: ", "square", "Image-2: ", "palette_512x512", "compare"],
    ["Image-1: ", "palette_512x512", "Image-2: ", "square", "compare"],
    ["wide_1300x800", "what is shown?"],
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each family answered, and how many visual tokens each picture had."""
    folder = tmp_path_factory.mktemp("families")
    jobs, rows = [], {}
    for family in FAMILIES:
        make = checkpoints.make_native if family.name.startswith("native") else checkpoints.make
        checkpoint, store = folder / family.name, folder / f"{family.name}-store"
        make(checkpoint, **family.options)
        rows[family.name] = embed(checkpoint, store)
        asked = [conversation(question, rows[family.name]) for question in QUESTIONS]
        jobs.append({"name": family.name, "checkpoint": str(checkpoint), "store": str(store), "conversations": asked})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run = [sys.executable, "-m", "tests.e2e.family_engine", str(folder / "jobs.json")]
    done = subprocess.run(run, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400, check=False)
    results = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, done.stdout[-5000:]
    return {result["name"]: {**result, "rows": rows[result["name"]], "log": done.stdout} for result in results}


@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_a_family_answers(answers: dict[str, dict[str, Any]], name: str) -> None:
    assert name in answers, "the engine ended before its turn"
    got = answers[name]
    assert "error" not in got, f"{name}: {got['error']}\n{got['log'][-3000:]}"
    text, square, palette, both, swapped, wide = got["tokens"]
    assert all(len(tokens) == 8 for tokens in got["tokens"])
    assert square != palette, "another image, another answer"
    assert both != swapped, "the order of images counts"
    assert len({tuple(tokens) for tokens in (text, square, palette, wide)}) == 4
    rows = got["rows"]
    lengths = got["prompts"]
    assert lengths[1] - lengths[0] == lengths[2] - lengths[0] >= rows["square"] == 256
    assert lengths[3] == lengths[4] > 512
    assert lengths[5] - lengths[1] == rows["wide_1300x800"] - 256

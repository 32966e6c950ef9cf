"""A program: makes each family's checkpoint, encodes images with it, and answers questions with vLLM's engine.

`python -m tests.e2e.family_engine FOLDER` prints one line `RESULT {JSON}` a family. All families share a process because
the imports take longer than the work; a server for each family would take a minute each.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.e2e.families import CONTEXT_TOKEN, FAMILIES, IMAGE_FILES, QUESTIONS, Family
from tests.e2e.serving import IMAGES, text_part


def encode_images(checkpoint: Path, store_folder: Path) -> dict[str, int]:
    """Encodes the images into a store, each under the name of its file; returns their numbers of visual tokens."""
    import torch

    from common.checkpoint import open_checkpoint
    from common.embedding import Header
    from common.options import read_options
    from common.tiling import Tiling
    from lm_worker.shared_memory import create_folder
    from lm_worker.store import Store
    from tests.vision_worker.images import pixels
    from vision_worker import encoder as encoders
    from vision_worker.config import VisionOptions
    from vision_worker.encoder import FeatureGroup
    from vision_worker.models import vir

    opened = open_checkpoint(checkpoint)
    description = opened.description
    encoder = encoders.load(read_options(VisionOptions, [str(checkpoint)], {}), opened)
    create_folder(store_folder)
    store = Store(store_folder, budget=64 << 20, lease=0)
    rows = {}
    for file in IMAGE_FILES:
        tiles = encoder.prepare(pixels((IMAGES / file).read_bytes()), Tiling(1, 2, description.thumbnail))
        policy = vir.select_policy(0, description.thresholds)
        features = encoder.forward(encoder.stage(list(tiles.pixels)))
        projected = encoder.project([FeatureGroup(features, range(len(tiles)), policy)])[0]
        embedding = torch.cat(projected.blocks).float()
        key = file.partition(".")[0]
        rows[key] = len(embedding)
        with store.writing(Header(key, opened.fingerprint, "float32", *embedding.shape)) as incoming:
            incoming.add(embedding.contiguous().numpy().tobytes())
    return rows


def conversation(parts: Sequence[str], rows: dict[str, int]) -> list[dict[str, Any]]:
    """Returns one user message; the name of an image in `parts` stands for its embedding."""
    images = {
        key: {"type": "image_embeds", "image_embeds": {"image_num_tokens": [count]}, "uuid": key} for key, count in rows.items()
    }
    return [{"role": "user", "content": [images.get(part) or text_part(part) for part in parts]}]


def answer(checkpoint: Path, store_folder: Path, conversations: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Returns greedy token ids and the length of the prompt for each conversation."""
    from vllm import LLM, SamplingParams
    from vllm.config import ECTransferConfig

    engine = LLM(
        str(checkpoint),
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        kv_cache_memory_bytes=128 << 20,
        enable_mm_embeds=True,
        limit_mm_per_prompt={"image": 0},
        interleave_mm_strings=True,
        ec_transfer_config=ECTransferConfig(
            ec_connector="SharedMemoryConnector",
            ec_connector_module_path="lm_worker.connector",
            ec_role="ec_consumer",
            ec_connector_extra_config={"folder": str(store_folder), "wait": 10},
        ),
    )
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    outputs = engine.chat(conversations, sampling, use_tqdm=False)
    engine.llm_engine.engine_core.shutdown()
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "prompts": [len(output.prompt_token_ids or ()) for output in outputs],
        "visual": [list(output.prompt_token_ids or ()).count(CONTEXT_TOKEN) for output in outputs],
    }


def make_and_encode(folder: Path) -> None:
    """Makes the families' checkpoints, encodes the images with each, and writes the numbers of visual tokens to `rows.json`.

    A process of its own: vLLM looks through the attributes of all loaded modules, and fails on those of llvmlite, which comes
    with the vision worker's numba.
    """
    from tests.checkpoints import write_checkpoint, write_native_checkpoint

    rows = {}
    for family in FAMILIES:
        checkpoint = folder / family.name
        (write_native_checkpoint if family.native else write_checkpoint)(checkpoint, **family.options)
        rows[family.name] = encode_images(checkpoint, store_of(folder, family))
        if family.language_alone:
            remove_vision_files(checkpoint)
    (folder / "rows.json").write_text(json.dumps(rows))


def remove_vision_files(checkpoint: Path) -> None:
    """Removes the files that a language worker does not download."""
    from common.checkpoint import open_checkpoint

    opened = open_checkpoint(checkpoint)
    files = set(opened.vision_files) - set(opened.language_files)
    assert files
    for name in files:
        (checkpoint / name).unlink()


def store_of(folder: Path, family: Family) -> Path:
    """Returns the folder of a family's embeddings."""
    return folder / f"{family.name}-store"


def answer_all(folder: Path) -> None:
    """Answers the questions with each family; an error of one is its result."""
    from vllm.distributed import cleanup_dist_env_and_memory

    all_rows: dict[str, dict[str, int]] = json.loads((folder / "rows.json").read_text())
    for family in FAMILIES:
        rows = all_rows[family.name]
        conversations = [conversation(question, rows) for question in QUESTIONS]
        try:
            result = {"rows": rows, **answer(folder / family.name, store_of(folder, family), conversations)}
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        cleanup_dist_env_and_memory()
        print("RESULT " + json.dumps({"name": family.name, **result}), flush=True)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if sys.argv[2:] == ["encode"]:
        make_and_encode(target)
    else:
        subprocess.run([sys.executable, "-m", "tests.e2e.family_engine", str(target), "encode"], check=True)
        os.environ |= {
            "DVD_LANGUAGE_WORKER": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_MEDIA_CONNECTOR": "dvd-refuse",
        }
        answer_all(target)

"""A program: vLLM's engine in this process, with embeddings that are delivered between its steps.

`python -m tests.lm_worker.prefill_engine FOLDER` encodes the images of golden cases, runs all scenarios with one engine, and
prints one line `RESULT {JSON}` for each.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.e2e.serving import GOLDEN, IMAGES, SYSTEM, text_part

CHECKPOINT = GOLDEN / "flash-qwen3/checkpoint"
CASES = json.loads((CHECKPOINT.parent / "cases.json").read_text())
TWO_IMAGES, THREE_IMAGES = CASES[11], CASES[12]
FRAMES = 16
BLOCK_TOKENS, BLOCKS, SHARE, CHUNK_TOKENS = 32, 200, 0.75, 1000
"""A KV cache of 6,400 tokens, of which 4,800 may be held by partial prefills; chunks end within images."""
WORDS = 480
"""A prompt of so many words fits beside two of three images, but not beside all."""


def encode(folder: Path) -> None:
    """Encode the golden images, and frames of a video, into a store.

    A process of its own: vLLM fails on attributes of llvmlite, which comes with the vision worker's numba.
    """
    import io

    import torch
    from PIL import Image

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

    opened = open_checkpoint(CHECKPOINT)
    description = opened.description
    encoder = encoders.load(read_options(VisionOptions, [str(CHECKPOINT)], {}), opened)
    create_folder(folder)
    store = Store(folder, budget=256 << 20, lease=0)
    tiling = Tiling(description.min_tiles, description.max_tiles, description.thumbnail)
    names = {name for case in (TWO_IMAGES, THREE_IMAGES) for name in case["images"]}
    files = {key_of(name): ((IMAGES / name).read_bytes(), tiling) for name in names}
    for index in range(FRAMES):
        frame = io.BytesIO()
        Image.linear_gradient("L").rotate(20 * index).convert("RGB").save(frame, "PNG")
        files[f"frame-{index}"] = (frame.getvalue(), Tiling(1, 1, False))
    policy = vir.select_policy(0, description.thresholds)
    for key, (data, bounds) in files.items():
        tiles = encoder.prepare(pixels(data), bounds)
        features = encoder.forward(encoder.stage(list(tiles.pixels)))
        projected = encoder.project([FeatureGroup(features, range(len(tiles)), policy)])[0]
        embedding = torch.cat(projected.blocks).float()
        with store.writing(Header(key, opened.fingerprint, "float32", *embedding.shape)) as incoming:
            incoming.add(embedding.contiguous().numpy().tobytes())


def key_of(image: str) -> str:
    """Return the key of a golden image's embedding."""
    return image.partition(".")[0]


class Run:
    """One engine, its store, and steps between deliveries. Each scenario begins with empty caches."""

    def __init__(self, folder: Path) -> None:
        from vllm import LLM
        from vllm.config import ECTransferConfig
        from vllm.config.ec_manager_config import EncoderCacheManagerConfig

        from lm_worker.shared_memory import create_folder
        from lm_worker.store import Store

        self._encoded, folder = folder / "encoded", folder / "store"
        create_folder(folder)
        self.store = Store(folder, budget=256 << 20, lease=0)
        self.engine = LLM(
            str(CHECKPOINT),
            dtype="float32",
            enforce_eager=True,
            block_size=BLOCK_TOKENS,
            num_gpu_blocks_override=BLOCKS,
            kv_cache_memory_bytes=256 << 20,
            max_model_len=BLOCKS * BLOCK_TOKENS - 400,
            max_num_batched_tokens=CHUNK_TOKENS,
            max_num_seqs=8,
            enable_mm_embeds=True,
            limit_mm_per_prompt={"image": 0},
            interleave_mm_strings=True,
            disable_log_stats=False,
            ec_transfer_config=ECTransferConfig(
                ec_connector="SharedMemoryConnector",
                ec_connector_module_path="lm_worker.connector",
                ec_role="ec_consumer",
                ec_connector_extra_config={"folder": str(folder), "wait": 600, "partial_share": SHARE},
            ),
            ec_manager_config=EncoderCacheManagerConfig(
                encoder_cache_manager_cls="lm_worker.encoder_cache.PinnedEncoderCacheManager"
            ),
        )
        self.scheduler: Any = self.engine.llm_engine.engine_core.engine_core.scheduler
        self._answers: dict[str, list[int]] = {}

    def reset(self) -> None:
        """Forget everything that earlier scenarios have left in the caches."""
        assert not self.scheduler.requests, "a scenario has left requests"
        self.engine.reset_prefix_cache()
        self.scheduler.reset_encoder_cache()
        self.engine.llm_engine.reset_encoder_cache()
        for key in [file.name for file in self._encoded.iterdir() if file.is_file()]:
            self.evict(key)

    def deliver(self, *keys: str) -> None:
        """Deliver embeddings to the store."""
        from lm_worker.shared_memory import map_embedding

        for key in keys:
            header, mapping = map_embedding(self._encoded / key)
            with self.store.writing(header) as incoming:
                incoming.add(bytes(mapping[-header.length :]))

    def evict(self, key: str) -> None:
        """Remove an embedding from the store if it is there."""
        if key in self.store:
            self.store._evict(key)

    def rows(self, key: str) -> int:
        """Return the visual tokens of an image."""
        from lm_worker.shared_memory import read_header

        return read_header(self._encoded / key).rows

    def add(self, messages: list[dict[str, Any]], max_tokens: int = 16) -> Any:
        """Add a request, and return it as vLLM's scheduler sees it."""
        from vllm import SamplingParams

        before = set(self.scheduler.requests)
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        self.engine.enqueue_chat([messages], sampling, use_tqdm=False)
        (name,) = set(self.scheduler.requests) - before
        return self.scheduler.requests[name]

    def add_case(self, case: dict[str, Any]) -> Any:
        """Add the request of a golden case."""
        return self.add(self.messages(case["question"], *map(key_of, case["images"])))

    def messages(self, question: str, *keys: str) -> list[dict[str, Any]]:
        """Return a conversation as the official code builds it."""
        parts: list[dict[str, Any]] = []
        for number, key in enumerate(keys, 1):
            parts += [text_part(f"Image-{number}: ")] if len(keys) > 1 else []
            parts.append({"type": "image_embeds", "image_embeds": {"image_num_tokens": [self.rows(key)]}, "uuid": key})
        template = json.loads((CHECKPOINT / "config.json").read_text())["template"]
        return [
            {"role": "system", "content": SYSTEM[template]},
            {"role": "user", "content": [*parts, text_part(question)]},
        ]

    def step(self) -> None:
        """Run one step of the engine, and keep the tokens of requests that end."""
        for output in self.engine.llm_engine.step():
            if output.finished:
                self._answers[output.request_id] = list(output.outputs[0].token_ids)

    def settle(self, *requests: Any) -> list[int]:
        """Step until the requests make no progress. Returns how many of their tokens are computed."""
        quiet, computed = 0, [request.num_computed_tokens for request in requests]
        while quiet < 4:
            self.step()
            previous, computed = computed, [request.num_computed_tokens for request in requests]
            quiet = quiet + 1 if computed == previous else 0
        return computed

    def finish(self, *requests: Any) -> list[list[int]]:
        """Step until all requests have ended. Returns their tokens."""
        for _ in range(2000):
            if all(request.is_finished() for request in requests):
                break
            self.step()
        names = [request.request_id for request in requests]
        return [
            next((tokens for known, tokens in self._answers.items() if name.rpartition("-")[0] == known), []) for name in names
        ]

    def leftovers(self) -> dict[str, int]:
        """Return what requests may hold, once none is left: blocks in use, pins, and partial prefills."""
        for _ in range(4):
            self.step()
        connector = self.scheduler.ec_connector
        return {
            "requests": len(self.scheduler.requests),
            "blocks": round(self.scheduler.kv_cache_manager.usage * BLOCKS),
            "pins": len(list((self.store.folder / ".pinned").iterdir())),
            "partial": len(connector._partial_prefills._tokens),
        }


def one_by_one(run: Run, case: dict[str, Any]) -> dict[str, Any]:
    """Images arrive in the order of the prompt."""
    request = run.add_case(case)
    computed = run.settle(request)
    for image in case["images"][:-1]:
        run.deliver(key_of(image))
        computed += run.settle(request)
    run.deliver(key_of(case["images"][-1]))
    offsets = [feature.mm_position.offset for feature in request.mm_features]
    return {"computed": computed, "offsets": offsets, "tokens": run.finish(request)}


def last_first(run: Run) -> dict[str, Any]:
    """Images arrive in reverse order: nothing can be prefilled but the text in front of the first one."""
    request = run.add_case(THREE_IMAGES)
    computed = run.settle(request)
    for image in reversed(THREE_IMAGES["images"]):
        run.deliver(key_of(image))
        if image != THREE_IMAGES["images"][0]:
            computed += run.settle(request)
    return {"computed": computed, "tokens": run.finish(request)}


def video(run: Run) -> dict[str, Any]:
    """A video of 16 frames: all are there at once, and then one by one beside requests that are complete."""
    keys = [f"frame-{index}" for index in range(FRAMES)]
    messages = run.messages("what happens?", *keys)
    run.deliver(*keys)
    expected = run.finish(run.add(messages))
    run.reset()
    request = run.add(messages)
    computed, texts = [], []
    for index, key in enumerate(keys):
        run.deliver(key)
        computed += run.settle(request)[:1] if index + 1 < FRAMES else []
        texts += run.finish(run.add(run.messages("what is a video?"))) if index % 5 == 0 else []
    return {"expected": expected, "tokens": run.finish(request), "computed": computed, "texts": texts}


def prefix_hit(run: Run) -> dict[str, Any]:
    """The first frames of a video are in the KV cache, their embeddings are gone, and the others come one by one."""
    keys = [f"frame-{index}" for index in range(FRAMES)]
    run.deliver(*keys)
    expected = run.finish(run.add(run.messages("what happens?", *keys)))
    run.reset()
    run.deliver(*keys[:8])
    run.finish(run.add(run.messages("what happens?", *keys[:8])))
    for key in keys[:7]:
        run.evict(key)
    request = run.add(run.messages("what happens?", *keys))
    computed = []
    for key in keys[8:]:  # the last tokens of frame 7 may lie outside the last whole block
        computed += run.settle(request)
        run.deliver(key)
    offsets = [feature.mm_position.offset for feature in request.mm_features]
    return {"expected": expected, "offsets": offsets, "computed": computed, "tokens": run.finish(request)}


def preempted_while_waiting(run: Run) -> dict[str, Any]:
    """A request that was prefilled in part loses its KV cache, and the prefix cache forgets it too."""
    request = run.add_case(THREE_IMAGES)
    run.deliver(*map(key_of, THREE_IMAGES["images"][:2]))
    before = run.settle(request)
    run.scheduler.reset_prefix_cache(reset_running_requests=True)
    lost = request.num_computed_tokens
    after = run.settle(request)
    run.deliver(key_of(THREE_IMAGES["images"][2]))
    return {
        "before": before, "lost": lost, "after": after, "preemptions": request.num_preemptions, "tokens": run.finish(request)
    }  # fmt: skip


def cache_full(run: Run) -> dict[str, Any]:
    """The rest of a partial prefill needs the KV cache of a request that came later, which is preempted."""
    request = run.add_case(THREE_IMAGES)
    run.deliver(*map(key_of, THREE_IMAGES["images"][:2]))
    computed = run.settle(request)
    other = run.add(run.messages("word " * WORDS), max_tokens=60)
    run.step()
    run.step()
    run.deliver(key_of(THREE_IMAGES["images"][2]))
    tokens = run.finish(request, other)
    result = {
        "computed": computed, "prompt": other.num_prompt_tokens, "preemptions": other.num_preemptions, "tokens": tokens
    }  # fmt: skip
    run.reset()
    return {**result, "other_alone": run.finish(run.add(run.messages("word " * WORDS), max_tokens=60))}


def share_used_up(run: Run) -> dict[str, Any]:
    """A second request waits for its last image, since the first one holds the share; a complete one passes both."""
    run.deliver(*map(key_of, THREE_IMAGES["images"][:2]))
    first, second = run.add_case(THREE_IMAGES), run.add_case(THREE_IMAGES | {"question": "and now?"})
    computed = run.settle(first, second)
    text = run.finish(run.add_case(CASES[13]))
    run.deliver(key_of(THREE_IMAGES["images"][2]))
    return {"computed": computed, "text": text, "tokens": run.finish(first, second)}


def aborted(run: Run) -> dict[str, Any]:
    """A request ends while it waits: before its first chunk, in between, and when the last image has just arrived."""
    left = []
    for arrived in range(4):
        request = run.add_case(THREE_IMAGES)
        run.deliver(*map(key_of, THREE_IMAGES["images"][:arrived]))
        if arrived < 3:
            run.settle(request)
        else:
            run.step()
        run.engine.llm_engine.abort_request([request.request_id], internal=True)
        left.append(run.leftovers())
        run.reset()
    return {"left": left}


SCENARIOS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "two images": lambda run: one_by_one(run, TWO_IMAGES),
    "three images": lambda run: one_by_one(run, THREE_IMAGES),
    "last first": last_first,
    "video": video,
    "prefix hit": prefix_hit,
    "preempted while waiting": preempted_while_waiting,
    "cache full": cache_full,
    "share used up": share_used_up,
    "aborted": aborted,
}


def run_all(folder: Path, names: Sequence[str]) -> None:
    """Run scenarios; an error of one is its result."""
    run = Run(folder)
    for name in names or SCENARIOS:
        try:
            run.reset()
            result = SCENARIOS[name](run) | {"leftovers": run.leftovers()}
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
            run.engine.llm_engine.abort_request(list(run.scheduler.requests), internal=True)
            run.leftovers()
        print("RESULT " + json.dumps({"name": name, **result}), flush=True)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if sys.argv[2:] == ["encode"]:
        encode(target / "encoded")
    else:
        if not (target / "encoded").exists():
            subprocess.run([sys.executable, "-m", "tests.lm_worker.prefill_engine", str(target), "encode"], check=True)
        os.environ |= {
            "DVD_LANGUAGE_WORKER": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_MEDIA_CONNECTOR": "dvd-refuse",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        run_all(target, sys.argv[2:])

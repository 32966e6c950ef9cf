"""Images/s of one core from a file's bytes to tiles that are ready for the device, against the usual processors.

Ours ends with uint8 tiles, because the rest is done where the tower is; vLLM's and transformers' end with floats. All run in
one process with one thread, on the same files, in turn. Equality to the bit is asserted in the run: our tiles, normalised as
the vision worker does it on the device, are vLLM's float tensor.
"""

import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.colocated import SITE
from benchmarks.options import Options
from benchmarks.result import Result, ratio_of
from common.tiling import Tiling
from vision_worker.models.internvl import normalize
from vision_worker.preprocessing.tiling import cut

PHOTOGRAPH = "sample_data/grace_hopper.jpg"  # NASA/US Navy, public domain, comes with matplotlib
SIZES = ((640, 480), (1280, 960), (1920, 1080))
MOST = 12


def photographs() -> dict[str, bytes]:
    """JPEG files of one photograph at several sizes."""
    import matplotlib

    with Image.open(Path(matplotlib.get_data_path()) / PHOTOGRAPH) as image:
        found = {}
        for size in SIZES:
            file = io.BytesIO()
            image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=90)
            found[f"{size[0]} × {size[1]}"] = file.getvalue()
    return found


def ours(data: bytes) -> Any:
    return cut(data, Tiling(1, MOST, True)).pixels


def run(options: Options) -> Result:
    """The headline is ours over vLLM's on the 1920 × 1080 file, one core."""
    if options.baseline is None:
        raise RuntimeError("vLLM's processor needs torchvision: name an environment that has it with --baseline")
    with subprocess.Popen(
        [options.baseline, "-m", "benchmarks.preprocessing", str(options.repeats(7))], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": f"{SITE}{os.pathsep}{os.getcwd()}"},
    ) as process:  # fmt: skip
        said, _ = process.communicate(timeout=600)
    if process.returncode:
        raise RuntimeError(f"the measuring process ended with {process.returncode}")
    found: dict[str, dict[str, list[float]]] = json.loads(said)
    ratio, spread = ratio_of(found["1920 × 1080"]["ours"], found["1920 × 1080"]["vllm"])
    figures: dict[str, Any] = {
        size: {name: round(statistics.median(rates), 2) for name, rates in by_name.items()} for size, by_name in found.items()
    }
    figures["scaling"] = _scaling(options.repeats(5))
    return Result("preprocessing", ratio, 1.4, spread, figures)


def _scaling(repeats: int) -> dict[str, float]:
    """Images/s of all cores over those of one: Pillow lets go of the interpreter while it decodes and resizes."""
    data = photographs()["1920 × 1080"]
    cores = len(os.sched_getaffinity(0))
    rates: dict[int, list[float]] = {1: [], cores: []}
    for _ in range(repeats):
        for threads, found in rates.items():
            with ThreadPoolExecutor(threads) as pool:
                began = time.perf_counter()
                list(pool.map(ours, [data] * 12 * threads))
                found.append(12 * threads / (time.perf_counter() - began))
    return {f"{threads} threads, images/s": round(statistics.median(found), 2) for threads, found in rates.items()}


# In the environment that has torchvision


def _processors() -> dict[str, Callable[[bytes], Any]]:
    return {"ours": ours, "vllm": _vllm(), "transformers": _transformers()}


def _vllm() -> Callable[[bytes], Any]:
    from vllm.transformers_utils.processors.internvl import image_to_pixel_values_internvl

    def process(data: bytes) -> Any:
        with Image.open(io.BytesIO(data)) as image:
            return image_to_pixel_values_internvl(
                image.convert("RGB"), input_size=448, min_num=1, max_num=MOST, use_thumbnail=True
            )

    return process


def _transformers() -> Callable[[bytes], Any]:
    from transformers import GotOcr2ImageProcessor

    made = GotOcr2ImageProcessor(
        size={"height": 448, "width": 448}, crop_to_patches=True, min_patches=1, max_patches=MOST,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip

    def process(data: bytes) -> Any:
        with Image.open(io.BytesIO(data)) as image:
            return made(image.convert("RGB"), return_tensors="pt")["pixel_values"]

    return process


def _measure(repeats: int) -> dict[str, dict[str, list[float]]]:
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    processors = _processors()
    found: dict[str, dict[str, list[float]]] = {}
    for size, data in photographs().items():
        assert torch.equal(normalize(torch.from_numpy(ours(data))), processors["vllm"](data)), f"other pixels at {size}"
        found[size] = {name: [] for name in processors}
        for _ in range(repeats):
            for name, process in processors.items():
                found[size][name].append(_rate(process, data))
    return found


def _rate(process: Callable[[bytes], Any], data: bytes, least: float = 0.5) -> float:
    began, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - began) < least:
        process(data)
        count += 1
    return count / seconds


def _main(arguments: Sequence[str]) -> None:
    print(json.dumps(_measure(int(arguments[0]))))


if __name__ == "__main__":
    _main(sys.argv[1:])

"""Images/s of one core from a JPEG file's bytes to tiles ready for the device, against vLLM's and transformers' processors.

Ours ends with uint8 tiles, because normalisation happens where the tower is; the others end with floats. All run in one
process with one thread, on the same files, in turn. The run asserts that our tiles, normalised as the vision worker does it
on the device, are bitwise equal to vLLM's float tensor.
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

from benchmarks.colocated import TORCHVISION_SHIM
from benchmarks.options import Options
from benchmarks.result import Result, median_ratio
from common.tiling import Tiling
from vision_worker.models.internvl import normalize
from vision_worker.preprocessing.tiling import cut

PHOTOGRAPH = "sample_data/grace_hopper.jpg"  # NASA/US Navy, public domain, distributed with matplotlib
SIZES = ((640, 480), (1280, 960), (1920, 1080))
HEADLINE_SIZE = "1920 × 1080"
MAX_TILES = 12
_PROCESS_TIMEOUT_SECONDS = 600
_MIN_MEASUREMENT_SECONDS = 0.5
_IMAGES_PER_THREAD = 12

Processor = Callable[[bytes], Any]


def photographs() -> dict[str, bytes]:
    """JPEG files of one photograph by size, such as `640 × 480`."""
    import matplotlib

    files = {}
    with Image.open(Path(matplotlib.get_data_path()) / PHOTOGRAPH) as image:
        for size in SIZES:
            file = io.BytesIO()
            image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=90)
            files[f"{size[0]} × {size[1]}"] = file.getvalue()
    return files


def our_processor(data: bytes) -> Any:
    """uint8 tiles of a JPEG file."""
    return cut(data, Tiling(1, MAX_TILES, True)).pixels


def run(options: Options) -> Result:
    """Measure all processors. The headline is ours over vLLM's on the 1920 × 1080 file with one core; the target is 1.4.

    They are measured in the baseline environment, which has torchvision.
    """
    baseline = options.require_baseline("vLLM's image processor needs torchvision")
    with subprocess.Popen(
        [baseline, "-m", "benchmarks.preprocessing", str(options.repeats(7))], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": f"{TORCHVISION_SHIM}{os.pathsep}{os.getcwd()}"},
    ) as process:  # fmt: skip
        output, _ = process.communicate(timeout=_PROCESS_TIMEOUT_SECONDS)
    if process.returncode:
        raise RuntimeError(f"the measuring process {baseline} ended with status {process.returncode}")
    rates: dict[str, dict[str, list[float]]] = json.loads(output)
    ratio, spread = median_ratio(rates[HEADLINE_SIZE]["ours"], rates[HEADLINE_SIZE]["vllm"])
    figures: dict[str, Any] = {
        size: {name: round(statistics.median(repeats), 2) for name, repeats in by_name.items()}
        for size, by_name in rates.items()
    }
    figures["scaling"] = _measure_scaling(options.repeats(5))
    return Result("preprocessing", ratio, 1.4, spread, figures)


def _measure_scaling(repeats: int) -> dict[str, float]:
    """Images/s with one thread and with one per core: Pillow releases the GIL while it decodes and resizes."""
    data = photographs()[HEADLINE_SIZE]
    cores = len(os.sched_getaffinity(0))
    rates: dict[int, list[float]] = {1: [], cores: []}
    for _ in range(repeats):
        for threads, measured in rates.items():
            images = [data] * _IMAGES_PER_THREAD * threads
            with ThreadPoolExecutor(threads) as pool:
                started_at = time.perf_counter()
                list(pool.map(our_processor, images))
                measured.append(len(images) / (time.perf_counter() - started_at))
    return {f"{threads} threads, images/s": round(statistics.median(measured), 2) for threads, measured in rates.items()}


# The rest runs in the baseline environment.


def _processors() -> dict[str, Processor]:
    return {"ours": our_processor, "vllm": _vllm_processor(), "transformers": _transformers_processor()}


def _vllm_processor() -> Processor:
    from vllm.transformers_utils.processors.internvl import image_to_pixel_values_internvl

    def process(data: bytes) -> Any:
        with Image.open(io.BytesIO(data)) as image:
            return image_to_pixel_values_internvl(
                image.convert("RGB"), input_size=448, min_num=1, max_num=MAX_TILES, use_thumbnail=True
            )

    return process


def _transformers_processor() -> Processor:
    from transformers import GotOcr2ImageProcessor

    processor = GotOcr2ImageProcessor(
        size={"height": 448, "width": 448}, crop_to_patches=True, min_patches=1, max_patches=MAX_TILES,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip

    def process(data: bytes) -> Any:
        with Image.open(io.BytesIO(data)) as image:
            return processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]

    return process


def _measure(repeats: int) -> dict[str, dict[str, list[float]]]:
    """Images/s by size and processor, in each repeat."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    processors = _processors()
    rates: dict[str, dict[str, list[float]]] = {}
    for size, data in photographs().items():
        ours, vllm = normalize(torch.from_numpy(our_processor(data))), processors["vllm"](data)
        assert torch.equal(ours, vllm), f"our pixels differ from vLLM's at {size}"
        rates[size] = {name: [] for name in processors}
        for _ in range(repeats):
            for name, process in processors.items():
                rates[size][name].append(_images_per_second(process, data))
    return rates


def _images_per_second(process: Processor, data: bytes) -> float:
    started_at, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started_at) < _MIN_MEASUREMENT_SECONDS:
        process(data)
        count += 1
    return count / seconds


def _main(arguments: Sequence[str]) -> None:
    print(json.dumps(_measure(int(arguments[0]))))


if __name__ == "__main__":
    _main(sys.argv[1:])

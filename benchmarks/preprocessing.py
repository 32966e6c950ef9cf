"""Images/s of one core from a JPEG file's bytes to tiles ready for the device, against vLLM's and transformers' processors.

Ours ends with uint8 tiles, because normalisation happens where the tower is; the others end with floats. Each has one core, and
they run on the same files, in turn. The run asserts that our tiles, normalised as the vision worker does it on the device, are
bitwise equal to vLLM's float tensor.
"""

import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from prometheus_client import CollectorRegistry

from benchmarks import preprocessing_scaling
from benchmarks.colocated import TORCHVISION_SHIM
from benchmarks.options import Options
from benchmarks.preprocessing_scaling import photograph
from benchmarks.result import Result, median_ratio
from common.decoder_processes import DecoderProcesses
from common.metrics import DecoderMetrics
from common.tiling import Tiling
from vision_worker.models.internvl import normalize
from vision_worker.preprocessing import image_decoder
from vision_worker.preprocessing.tiling import cut

SIZES = ((640, 480), (1280, 960), (1920, 1080))
HEADLINE_SIZE = "1920 × 1080"
MAX_TILES = 12
_PROCESS_TIMEOUT_SECONDS = 600
_MIN_MEASUREMENT_SECONDS = 0.5
_DECODE_TIMEOUT_SECONDS, _DECODE_MEMORY_BYTES, _MAX_PIXELS = 20.0, 2 << 30, 64_000_000

Processor = Callable[[bytes], Any]


def photographs() -> dict[str, bytes]:
    """JPEG files of one photograph by size, such as `640 × 480`."""
    return {f"{width} × {height}": photograph((width, height)) for width, height in SIZES}


@contextlib.contextmanager
def our_processor() -> Iterator[Processor]:
    """Yield what makes uint8 tiles of a JPEG file: a decoder process decodes it, as in a vision worker."""
    with DecoderProcesses(image_decoder.KIND, _DECODE_MEMORY_BYTES, DecoderMetrics(CollectorRegistry())) as processes:
        decoder = image_decoder.ImageDecoder(processes, _DECODE_TIMEOUT_SECONDS, _MAX_PIXELS)
        yield lambda data: decoder.decode(data, lambda image: cut(image, Tiling(1, MAX_TILES, True))).pixels


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
    figures["scaling"] = preprocessing_scaling.measure(options.repeats(5))
    return Result("preprocessing", ratio, 1.4, spread, figures)


# The rest runs in the baseline environment.


def _processors(ours: Processor) -> dict[str, Processor]:
    return {"ours": ours, "vllm": _vllm_processor(), "transformers": _transformers_processor()}


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
    with our_processor() as ours:
        processors = _processors(ours)
        return {size: _measure_file(size, data, processors, repeats) for size, data in photographs().items()}


def _measure_file(size: str, data: bytes, processors: dict[str, Processor], repeats: int) -> dict[str, list[float]]:
    ours, vllm = normalize(torch.from_numpy(processors["ours"](data))), processors["vllm"](data)
    assert torch.equal(ours, vllm), f"our pixels differ from vLLM's at {size}"
    rates: dict[str, list[float]] = {name: [] for name in processors}
    for _ in range(repeats):
        for name, process in processors.items():
            rates[name].append(_images_per_second(process, data))
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

"""How preprocessing grows with cores: images/s of a vision worker's own path on one core and on all, and cores for a GPU.

The path is that of the worker: its threads take turns, a decoder process decodes the file, and the thread cuts the pixels.
Three set-ups are measured in turn: a worker on one core, one on all cores, and one worker per core. The last one shares no
interpreter lock, so it shows what the machine itself loses when all of its cores are busy.

`python -m benchmarks.preprocessing_scaling [REPEATS]` prints the figures as JSON.
"""

import asyncio
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from prometheus_client import CollectorRegistry

from benchmarks.result import median_ratio
from common.decoder_processes import Call, DecoderProcesses
from common.metrics import DecoderMetrics
from common.tiling import Tiling
from vision_worker.prepare_threads import PrepareThreads
from vision_worker.preprocessing.image_decoder import KIND, ImageDecoder
from vision_worker.preprocessing.tiling import cut

SIZES = ((1920, 1080), (1920, 1440))
"""The first one has 8 tiles and a thumbnail, the second one 12 and a thumbnail."""
GPU_TILES_PER_SECOND = 1092
"""What InternViT-300M would encode on an H100 with all of the 790 TFLOP/s that it can reach; it has half of them."""
_TILING = Tiling(1, 12, True)
_SECONDS = 3.0
_DECODE_TIMEOUT_SECONDS, _DECODE_MEMORY_BYTES, _MAX_PIXELS = 20.0, 2 << 30, 64_000_000
_PHOTOGRAPH = "sample_data/grace_hopper.jpg"  # NASA/US Navy, public domain, distributed with matplotlib

Setup = Sequence[Sequence[int]]
"""The cores of each worker."""


def measure(repeats: int) -> dict[str, Any]:
    """Return figures for each size of image, medians over the repeats."""
    cores = sorted(os.sched_getaffinity(0))
    setups: dict[str, Setup] = {
        "one core": [cores[:1]],
        "all cores, one worker": [cores],
        "all cores, a worker per core": [[core] for core in cores],
    }
    return {
        f"{width} × {height}": _figures(setups, (width, height), len(cores), repeats) for width, height in SIZES
    }  # fmt: skip


def _figures(setups: dict[str, Setup], size: tuple[int, int], cores: int, repeats: int) -> dict[str, Any]:
    rounds = [{name: run_workers(setup, size, _SECONDS) for name, setup in setups.items()} for _ in range(repeats)]
    rates = {name: [entry[name]["images"] for entry in rounds] for name in setups}
    one, together, apart = rates.values()
    tiles = rounds[0]["one core"]["tiles"]
    cpu_seconds = statistics.median(entry["all cores, one worker"]["cpu"] for entry in rounds)
    per_core = statistics.median(together) / cores
    return {
        "tiles per image": tiles,
        **{f"{name}, images/s": round(statistics.median(values), 2) for name, values in rates.items()},
        "share of linear": round(median_ratio(together, one)[0] / cores, 3),
        "share of linear, a worker per core": round(median_ratio(apart, one)[0] / cores, 3),
        "one worker / a worker per core": round(median_ratio(together, apart)[0], 3),
        "CPU ms per image": round(1e3 * cpu_seconds, 2),
        f"cores for {GPU_TILES_PER_SECOND} tiles/s": round(GPU_TILES_PER_SECOND / tiles / per_core, 1),
    }


def run_workers(setup: Setup, size: tuple[int, int], seconds: float) -> dict[str, float]:
    """Measure workers that run at the same time. Returns images/s of all, CPU seconds of an image, and its tiles."""
    command = [sys.executable, "-m", "benchmarks.preprocessing_scaling", "worker", *map(str, size), str(seconds)]
    workers = [
        subprocess.Popen([*command, *map(str, cores)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for cores in setup
    ]  # fmt: skip
    try:
        for worker in workers:
            assert worker.stdout
            worker.stdout.readline()  # it is warm
        for worker in workers:
            assert worker.stdin
            worker.stdin.write("start\n")
            worker.stdin.flush()
        results = [json.loads(worker.communicate()[0]) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    rate = sum(result["images"] for result in results)
    cpu_seconds = sum(result["cpu"] * result["images"] for result in results) / rate
    return {"images": rate, "cpu": cpu_seconds, "tiles": results[0]["tiles"]}


async def _work(size: tuple[int, int], seconds: float, threads: int) -> None:
    """Be a worker: warm up, wait for a line of the parent, and print images/s, CPU seconds of an image, and its tiles."""
    data = photograph(size)
    with DecoderProcesses(KIND, _DECODE_MEMORY_BYTES, DecoderMetrics(CollectorRegistry())) as processes:
        decoder = ImageDecoder(processes, _DECODE_TIMEOUT_SECONDS, _MAX_PIXELS)

        def prepare(call: Call) -> int:
            return len(decoder.decode(data, lambda image: cut(image, _TILING), call))

        def cpu_seconds() -> float:
            own = resource.getrusage(resource.RUSAGE_SELF)
            return own.ru_utime + own.ru_stime + processes.cpu_seconds()

        with PrepareThreads(threads, processes.cpu_seconds) as pool:
            tiles = await asyncio.gather(*(pool.run("caller", prepare) for _ in range(2 * threads)))
            print("warm", flush=True)
            await asyncio.to_thread(sys.stdin.readline)
            started, cpu_before = time.monotonic(), cpu_seconds()

            async def send() -> int:
                """Keep an image waiting for each thread, as a saturated worker has."""
                count = 0
                while time.monotonic() - started < seconds:
                    await pool.run("caller", prepare)
                    count += 1
                return count

            images = sum(await asyncio.gather(*(send() for _ in range(2 * threads))))
            elapsed = time.monotonic() - started
            print(json.dumps({"images": images / elapsed, "cpu": (cpu_seconds() - cpu_before) / images, "tiles": tiles[0]}))


def photograph(size: tuple[int, int]) -> bytes:
    """Return a JPEG file of a photograph with this width and height in pixels."""
    import matplotlib

    file = io.BytesIO()
    with Image.open(Path(matplotlib.get_data_path()) / _PHOTOGRAPH) as image:
        image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=90)
    return file.getvalue()


def _main(arguments: Sequence[str]) -> None:
    if arguments[:1] == ["worker"]:
        width, height, seconds, *cores = arguments[1:]
        os.sched_setaffinity(0, set(map(int, cores)))
        asyncio.run(_work((int(width), int(height)), float(seconds), len(cores)))
    else:
        print(json.dumps(measure(int(arguments[0]) if arguments else 5), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    _main(sys.argv[1:])

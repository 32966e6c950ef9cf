"""Whether the CPU keeps up: tiles/s that decoding and cutting give with one thread, several threads and several processes."""

import io
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.gpu.kit import Kit, Measurement
from common.tiling import Tiling
from vision_worker.preprocessing.decoding import decode
from vision_worker.preprocessing.tiling import cut

_SIZE = (1920, 1080)
_MAX_PIXELS = 64_000_000
_IMAGES_PER_WORKER = 24
_COARSENESS = 16


def measurements(kit: Kit) -> Iterator[Measurement]:
    """Yield one measurement."""
    yield Measurement("preprocessing, JPEG of 1920 × 1080", 30, lambda: _measure(kit))


def _measure(kit: Kit) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0))
    data, images = jpeg(_SIZE), 1 if kit.dry else _IMAGES_PER_WORKER
    tiles = count_tiles(data)
    figures: dict[str, Any] = {"cores": cores, "tiles per image": tiles}
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(cores) as threads:
        figures["tiles/s, one thread"] = _tiles_per_second(one, data, images, 1)
        figures["tiles/s, a thread per core"] = _tiles_per_second(threads, data, images, cores)
    # not forked: this process has threads that may hold locks
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as processes:
        figures["tiles/s, a process per core"] = _tiles_per_second(processes, data, images, cores)
    figures["share of linear, threads"] = round(
        figures["tiles/s, a thread per core"] / (cores * figures["tiles/s, one thread"]), 3
    )
    return figures


def _tiles_per_second(pool: Executor, data: bytes, images: int, workers: int) -> float:
    """Return the rate of a pool with this many workers, each of which gets this many images."""
    list(pool.map(count_tiles, [data] * workers))  # starts the workers, which load compiled code
    started_at = time.perf_counter()
    tiles = sum(pool.map(count_tiles, [data] * images * workers))
    return round(tiles / (time.perf_counter() - started_at), 2)


def count_tiles(data: bytes) -> int:
    """Decode and cut an image file, and return the number of its tiles; the pixels stay where they were cut."""
    return len(cut(np.asarray(decode(data, _MAX_PIXELS)), Tiling(1, 12, True)).pixels)


def jpeg(size: tuple[int, int], seed: int = 0) -> bytes:
    """Return a JPEG of coarse noise, which costs about as much to decode as a photograph."""
    columns, rows = (side // _COARSENESS + 1 for side in size)
    noise = Image.frombytes("RGB", (columns, rows), random.Random(seed).randbytes(3 * columns * rows))
    file = io.BytesIO()
    noise.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()

"""Resampling equals Pillow's, bit for bit."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vision_worker.preprocessing.resampling import Bytes, resize, weights

Size = tuple[int, int]
ROOT = Path(__file__).parents[3]


def random_image(size: Size, seed: int = 0) -> Bytes:
    """Random pixels; for an even seed black and white only, where weighted sums leave the range of a byte."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return values if seed % 2 else np.where(values > 127, 255, 0).astype(np.uint8)


def resize_with_pillow(pixels: Bytes, size: Size) -> Bytes:
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


@pytest.mark.parametrize("seed", range(8))
def test_random_sizes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for number in range(40):
        width, height, *to = (int(2**power) for power in rng.uniform(0, 8.5, 4))
        pixels, size = random_image((width, height), number), (to[0], to[1])
        assert np.array_equal(resize(pixels, [size])[0], resize_with_pillow(pixels, size)), f"{width} × {height} to {size}"


@pytest.mark.parametrize(
    ("size", "to"),
    [
        ((1920, 1080), (1344, 1344)), ((640, 480), (1792, 1344)), ((800, 1300), (448, 448)), ((100, 1900), (448, 448)),
        ((448, 448), (448, 448)), ((448, 900), (448, 448)), ((900, 448), (448, 448)), ((1, 1), (448, 448)),
        ((3000, 2), (448, 448)), ((2, 3000), (448, 448)), ((500, 502), (499, 500)), ((500, 503), (499, 500)),
    ],
)  # fmt: skip
def test_grid_sizes_and_edge_cases(size: Size, to: Size) -> None:
    pixels = random_image(size)
    assert np.array_equal(resize(pixels, [to])[0], resize_with_pillow(pixels, to))


def test_several_sizes_in_one_call() -> None:
    pixels = random_image((300, 700))
    for result, size in zip(resize(pixels, [(896, 448), (448, 448)]), [(896, 448), (448, 448)], strict=True):
        assert np.array_equal(result, resize_with_pillow(pixels, size))


def test_non_contiguous_memory() -> None:
    pixels = random_image((64, 50))
    assert np.array_equal(resize(pixels[::2, ::-1], [(20, 30)])[0], resize_with_pillow(pixels[::2, ::-1].copy(), (20, 30)))


def test_concurrent_threads() -> None:
    pixels = [random_image((200 + number, 150), number) for number in range(12)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda image: resize(image, [(448, 448)])[0], pixels))
    for result, image in zip(results, pixels, strict=True):
        assert np.array_equal(result, resize_with_pillow(image, (448, 448)))


def test_weights_sum_to_one_and_stay_inside_the_line() -> None:
    for size, target in ((1, 448), (7, 448), (448, 448), (5000, 448)):
        by = weights(size, target)
        assert by.first.min() >= 0
        assert (by.first + by.count).max() <= size
        assert np.abs(by.taps.sum(1) - 2**22).max() <= by.count.max()


def _resize_in_a_new_process(**environment: str) -> int:
    """Resizes an image in a new process, and returns how many functions it has loaded instead of compiling them."""
    code = (
        "import numpy as np; from vision_worker.preprocessing import resampling as r;"
        "r.resize(np.zeros((9, 7, 3), np.uint8), [(3, 3)]); print(sum(r._filter.stats.cache_hits.values()))"
    )
    variables = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    return int(subprocess.check_output([sys.executable, "-c", code], env={**variables, **environment}, cwd=ROOT, text=True))


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    assert [_resize_in_a_new_process(NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2)] == [0, 1]


def test_a_process_without_a_folder_to_store_what_it_compiles_resizes_too() -> None:
    assert _resize_in_a_new_process(NUMBA_CACHE_LOCATOR_CLASSES="UserProvidedCacheLocator") == 0

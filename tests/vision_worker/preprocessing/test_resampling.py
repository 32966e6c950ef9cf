"""Against Pillow itself, bit for bit."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from vision_worker.preprocessing.resampling import Bytes, resized, weights

Size = tuple[int, int]


def drawn(size: Size, seed: int = 0) -> Bytes:
    """Every second one black and white only: that is where sums leave the range of bytes."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return values if seed % 2 else np.where(values > 127, 255, 0).astype(np.uint8)


def by_pillow(pixels: Bytes, size: Size) -> Bytes:
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


@pytest.mark.parametrize("seed", range(8))
def test_any_sizes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for number in range(40):
        width, height, *to = (int(2**power) for power in rng.uniform(0, 8.5, 4))
        pixels, size = drawn((width, height), number), (to[0], to[1])
        assert np.array_equal(resized(pixels, [size])[0], by_pillow(pixels, size)), f"{width} × {height} to {size}"


@pytest.mark.parametrize(
    ("size", "to"),
    [
        ((1920, 1080), (1344, 1344)), ((640, 480), (1792, 1344)), ((800, 1300), (448, 448)), ((100, 1900), (448, 448)),
        ((448, 448), (448, 448)), ((448, 900), (448, 448)), ((900, 448), (448, 448)), ((1, 1), (448, 448)),
        ((3000, 2), (448, 448)), ((2, 3000), (448, 448)), ((500, 502), (499, 500)), ((500, 503), (499, 500)),
    ],
)  # fmt: skip
def test_sizes_of_tiles_and_edges(size: Size, to: Size) -> None:
    pixels = drawn(size)
    assert np.array_equal(resized(pixels, [to])[0], by_pillow(pixels, to))


def test_several_sizes_at_once() -> None:
    pixels = drawn((300, 700))
    for made, size in zip(resized(pixels, [(896, 448), (448, 448)]), [(896, 448), (448, 448)], strict=True):
        assert np.array_equal(made, by_pillow(pixels, size))


def test_memory_that_does_not_lie_together() -> None:
    pixels = drawn((64, 50))
    assert np.array_equal(resized(pixels[::2, ::-1], [(20, 30)])[0], by_pillow(pixels[::2, ::-1].copy(), (20, 30)))


def test_threads_at_once() -> None:
    pixels = [drawn((200 + number, 150), number) for number in range(12)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda one: resized(one, [(448, 448)])[0], pixels))
    assert all(np.array_equal(one, by_pillow(source, (448, 448))) for one, source in zip(made, pixels, strict=True))


def test_weights_add_up_and_stay_inside() -> None:
    for size, target in ((1, 448), (7, 448), (448, 448), (5000, 448)):
        made = weights(size, target)
        assert made.first.min() >= 0
        assert (made.first + made.count).max() <= size
        assert np.abs(made.taps.sum(1) - 2**22).max() <= made.count.max()

"""Batches of tiles: how they are formed, which calls are dropped, and which calls a failure affects."""

import asyncio
import threading
from itertools import chain

import numpy as np
import pytest
import torch
from torch import Tensor

from common import errors
from common.checkpoint import open_checkpoint
from tests.vision_worker import golden
from vision_worker.batcher import Batcher, EncodedGroup
from vision_worker.encoder import Placement
from vision_worker.metrics import Metrics
from vision_worker.models import vir
from vision_worker.models.fake import Fake
from vision_worker.preprocessing.tiling import Tiles

KEEP = vir.Fixed(False)
SIDE = 448


class RecordingEncoder(Fake):
    """Records the first value of each tile of each batch; waits while `open` is clear, and fails on a tile of `POISON`."""

    POISON = 255

    def __init__(self) -> None:
        checkpoint = open_checkpoint(golden.FOLDER / "flash-qwen3/checkpoint")
        super().__init__(checkpoint, Placement(torch.device("cpu"), torch.float32))
        self.batches: list[list[int]] = []
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()

    def forward(self, pixels: Tensor) -> Tensor:
        self.batches.append(pixels[:, 0, 0, 0].tolist())
        self.entered.set()
        self.open.wait(10)
        if self.POISON in self.batches[-1]:
            raise RuntimeError("the batch fails")
        return super().forward(pixels)


def image_of(*values: int) -> Tiles:
    """An image of one-coloured tiles."""
    pixels = np.stack([np.full((SIDE, SIDE, 3), value, dtype=np.uint8) for value in values])
    return Tiles(pixels, len(values), 1, tuple(values))


async def encode(batcher: Batcher, *images: Tiles, policy: vir.Policy = KEEP) -> EncodedGroup:
    return await batcher.encode(images, policy, torch.float32)


async def wait_for_first_batch(encoder: RecordingEncoder) -> None:
    assert await asyncio.to_thread(encoder.entered.wait, 10)


async def test_tiles_of_several_calls_share_a_batch_up_to_the_maximum() -> None:
    encoder = RecordingEncoder()
    encoder.open.clear()
    async with Batcher(encoder, 4) as batcher:
        calls = [asyncio.create_task(encode(batcher, image_of(0)))]
        await wait_for_first_batch(encoder)
        calls += [asyncio.create_task(encode(batcher, image_of(*range(n, n + 3)))) for n in (10, 20, 30, 40)]
        await asyncio.sleep(0.05)
        encoder.open.set()
        groups = await asyncio.gather(*calls)
    assert [len(group.images[0].compressed) for group in groups] == [1, 3, 3, 3, 3]
    assert max(map(len, encoder.batches)) == 4
    assert list(chain(*encoder.batches)) == [0, 10, 11, 12, 20, 21, 22, 30, 31, 32, 40, 41, 42]


async def test_embeddings_do_not_depend_on_other_calls() -> None:
    async with Batcher(RecordingEncoder(), 3) as batcher:
        alone = await encode(batcher, image_of(1, 2, 3, 4, 5))
        groups = await asyncio.gather(*(encode(batcher, image_of(*values)) for values in [(9, 8), (1, 2, 3, 4, 5), (7,)]))
    assert bytes(groups[1].images[0].data) == bytes(alone.images[0].data)


async def test_a_group_is_split_by_image_and_equal_tiles_are_computed_once() -> None:
    encoder = RecordingEncoder()
    async with Batcher(encoder, 8) as batcher:
        group = await encode(batcher, image_of(1, 2, 1), image_of(1, 2, 1), image_of(3))
    first, second, third = group.images
    assert list(chain(*encoder.batches)) == [1, 2, 3]
    assert bytes(first.data) == bytes(second.data)
    assert (first.rows, third.rows) == (3 * 256, 256)
    assert len(first.data) == first.rows * 128 * 4


async def test_a_cancelled_call_is_dropped_before_the_device() -> None:
    encoder = RecordingEncoder()
    encoder.open.clear()
    async with Batcher(encoder, 1) as batcher:
        first = asyncio.create_task(encode(batcher, image_of(0)))
        await wait_for_first_batch(encoder)
        ready = asyncio.create_task(encode(batcher, image_of(1)))
        leaving = asyncio.create_task(encode(batcher, image_of(2, 3, 4)))
        staying = asyncio.create_task(encode(batcher, image_of(5)))
        await asyncio.sleep(0.05)
        leaving.cancel()
        await asyncio.sleep(0)
        encoder.open.set()
        await asyncio.gather(first, ready, staying)
    assert encoder.batches == [[0], [1], [5]]


async def test_a_call_cancelled_half_way_computes_no_further_tiles() -> None:
    encoder = RecordingEncoder()
    encoder.open.clear()
    async with Batcher(encoder, 1) as batcher:
        leaving = asyncio.create_task(encode(batcher, image_of(0, 1, 2, 3, 4, 5)))
        await wait_for_first_batch(encoder)
        leaving.cancel()
        await asyncio.sleep(0)
        encoder.open.set()
        await encode(batcher, image_of(9))
    assert encoder.batches in ([[0], [1], [9]], [[0], [9]])


async def test_waiting_tiles_are_counted_until_a_batch_takes_them_or_the_call_is_cancelled() -> None:
    encoder, metrics = RecordingEncoder(), Metrics()
    encoder.open.clear()
    waiting, batches = "dvd_vision_waiting_tiles", "dvd_vision_batch_tiles_sum"
    async with Batcher(encoder, 2, metrics) as batcher:
        first = asyncio.create_task(encode(batcher, image_of(0)))
        await wait_for_first_batch(encoder)
        staying = asyncio.create_task(encode(batcher, image_of(1, 2, 3, 4, 5)))
        leaving = asyncio.create_task(encode(batcher, image_of(*range(20, 26), 25)))
        async with asyncio.timeout(10):
            while metrics.registry.get_sample_value(waiting) != 3 + 6:  # two are in the staged batch; equal tiles count once
                await asyncio.sleep(0.01)
        leaving.cancel()
        encoder.open.set()
        await asyncio.gather(first, staying)
        await encode(batcher, image_of(9))
    assert metrics.registry.get_sample_value(waiting) == 0
    assert metrics.registry.get_sample_value(batches) == sum(map(len, encoder.batches)) == 1 + 5 + 1


async def test_a_failing_batch_fails_its_calls_and_no_others() -> None:
    encoder = RecordingEncoder()
    async with Batcher(encoder, 2) as batcher:
        with pytest.raises(errors.InternalError, match="see its log"):
            await encode(batcher, image_of(1, 2, 255, 4, 5, 6))
        group = await encode(batcher, image_of(7))
        assert not batcher.device_lost.is_set()
    assert group.images[0].rows == 256


async def test_a_device_that_no_longer_computes_is_reported_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_more: object) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    encoder = RecordingEncoder()
    async with Batcher(encoder, 2) as batcher:
        monkeypatch.setattr(torch, "ones", fail)
        with pytest.raises(errors.WorkerUnavailable, match="device cpu of the vision worker is no longer usable"):
            await encode(batcher, image_of(255))
        await asyncio.wait_for(batcher.device_lost.wait(), 10)


async def test_a_device_that_is_out_of_memory_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_args: object, **_more: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    async with Batcher(RecordingEncoder(), 2) as batcher:
        monkeypatch.setattr(torch, "ones", out_of_memory)
        with pytest.raises(errors.InternalError, match="see its log"):
            await encode(batcher, image_of(255))
        await encode(batcher, image_of(7))
        assert not batcher.device_lost.is_set()


async def test_infinite_values_are_an_error() -> None:
    encoder = RecordingEncoder()
    encoder._table[:] = float("inf")
    async with Batcher(encoder, 2) as batcher:
        with pytest.raises(errors.InternalError, match="infinite"):
            await encode(batcher, image_of(1))


async def test_routes_are_decided_over_the_whole_group() -> None:
    """Although its tiles are computed in batches of two."""
    policy = vir.Learned(0.5, 0.0)
    async with Batcher(RecordingEncoder(), 2) as batcher:
        image = (await encode(batcher, image_of(*range(7)), policy=policy)).images[0]
    assert image.compressed == policy.route(torch.tensor(image.scores)).tolist()
    assert sum(image.compressed) == 3


async def test_warming_up_runs_the_largest_batch() -> None:
    encoder = RecordingEncoder()
    async with Batcher(encoder, 5) as batcher:
        await batcher.warm_up()
    assert [len(batch) for batch in encoder.batches] == [5]

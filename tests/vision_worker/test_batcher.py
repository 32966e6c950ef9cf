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
from vision_worker.batcher import Answer, Batcher
from vision_worker.encoder import Placement
from vision_worker.metrics import Metrics
from vision_worker.models import fake, vir
from vision_worker.models.fake import Fake
from vision_worker.preprocessing.tiling import Tiles

KEEP = vir.Fixed(False)
SIDE = 448


class Watched(Fake):
    """Records what each batch held; may be held up, and fails on a tile of `poison`."""

    poison = 255

    def __init__(self) -> None:
        made = fake.load(
            open_checkpoint(golden.FOLDER / "flash-qwen3/checkpoint"), Placement(torch.device("cpu"), torch.float32)
        )
        super().__init__(made.checkpoint, made.placement)
        self.batches: list[list[int]] = []
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()

    def forward(self, pixels: Tensor) -> Tensor:
        self.batches.append(pixels[:, 0, 0, 0].tolist())
        self.entered.set()
        self.open.wait(10)
        if self.poison in self.batches[-1]:
            raise RuntimeError("the device is gone")
        return super().forward(pixels)


def made_of(*values: int) -> Tiles:
    pixels = np.stack([np.full((SIDE, SIDE, 3), value, dtype=np.uint8) for value in values])
    return Tiles(pixels, len(values), 1, tuple(values))


async def encode(batcher: Batcher, *images: Tiles, policy: vir.Policy = KEEP) -> Answer:
    return await batcher.encode(images, policy, torch.float32)


async def until_it_runs(encoder: Watched) -> None:
    assert await asyncio.to_thread(encoder.entered.wait, 10)


async def test_tiles_of_several_calls_share_a_batch_within_the_budget() -> None:
    encoder = Watched()
    encoder.open.clear()
    async with Batcher(encoder, 4) as batcher:
        calls = [asyncio.create_task(encode(batcher, made_of(0)))]
        await until_it_runs(encoder)
        calls += [asyncio.create_task(encode(batcher, made_of(*range(n, n + 3)))) for n in (10, 20, 30, 40)]
        await asyncio.sleep(0.05)
        encoder.open.set()
        answers = await asyncio.gather(*calls)
    assert [len(answer.images[0].compressed) for answer in answers] == [1, 3, 3, 3, 3]
    assert max(map(len, encoder.batches)) == 4
    assert list(chain(*encoder.batches)) == [0, 10, 11, 12, 20, 21, 22, 30, 31, 32, 40, 41, 42]


async def test_embeddings_do_not_depend_on_company() -> None:
    async with Batcher(Watched(), 3) as batcher:
        alone = await encode(batcher, made_of(1, 2, 3, 4, 5))
        company = await asyncio.gather(*(encode(batcher, made_of(*values)) for values in [(9, 8), (1, 2, 3, 4, 5), (7,)]))
    assert bytes(company[1].images[0].data) == bytes(alone.images[0].data)


async def test_a_group_is_split_by_image_and_equal_tiles_are_looked_at_once() -> None:
    encoder = Watched()
    async with Batcher(encoder, 8) as batcher:
        answer = await encode(batcher, made_of(1, 2, 1), made_of(1, 2, 1), made_of(3))
    first, second, third = answer.images
    assert list(chain(*encoder.batches)) == [1, 2, 3]
    assert bytes(first.data) == bytes(second.data)
    assert (first.rows, third.rows) == (3 * 256, 256)
    assert len(first.data) == first.rows * 128 * 4


async def test_a_caller_who_left_is_dropped_before_the_device() -> None:
    encoder = Watched()
    encoder.open.clear()
    async with Batcher(encoder, 1) as batcher:
        first = asyncio.create_task(encode(batcher, made_of(0)))
        await until_it_runs(encoder)
        ready = asyncio.create_task(encode(batcher, made_of(1)))
        leaving = asyncio.create_task(encode(batcher, made_of(2, 3, 4)))
        staying = asyncio.create_task(encode(batcher, made_of(5)))
        await asyncio.sleep(0.05)
        leaving.cancel()
        await asyncio.sleep(0)
        encoder.open.set()
        await asyncio.gather(first, ready, staying)
    assert encoder.batches == [[0], [1], [5]]


async def test_a_caller_who_leaves_half_way_stops_its_other_tiles() -> None:
    encoder = Watched()
    encoder.open.clear()
    async with Batcher(encoder, 1) as batcher:
        leaving = asyncio.create_task(encode(batcher, made_of(0, 1, 2, 3, 4, 5)))
        await until_it_runs(encoder)
        leaving.cancel()
        await asyncio.sleep(0)
        encoder.open.set()
        await encode(batcher, made_of(9))
    assert encoder.batches in ([[0], [1], [9]], [[0], [9]])


async def test_tiles_wait_until_a_batch_takes_them_or_their_caller_leaves() -> None:
    encoder, metrics = Watched(), Metrics()
    encoder.open.clear()
    waiting, batches = "dvd_vision_waiting_tiles", "dvd_vision_batch_tiles_sum"
    async with Batcher(encoder, 2, metrics) as batcher:
        first = asyncio.create_task(encode(batcher, made_of(0)))
        await until_it_runs(encoder)
        staying = asyncio.create_task(encode(batcher, made_of(1, 2, 3, 4, 5)))
        leaving = asyncio.create_task(encode(batcher, made_of(6, 7, 8, 8)))
        async with asyncio.timeout(10):
            while metrics.registry.get_sample_value(waiting) != 3 + 3:  # two are in the batch that is ready; 8 is 8
                await asyncio.sleep(0.01)
        leaving.cancel()
        encoder.open.set()
        await asyncio.gather(first, staying)
        await encode(batcher, made_of(9))
    assert metrics.registry.get_sample_value(waiting) == 0
    assert metrics.registry.get_sample_value(batches) == sum(map(len, encoder.batches)) == 1 + 5 + 1


async def test_a_failing_batch_fails_its_calls_and_no_other() -> None:
    encoder = Watched()
    async with Batcher(encoder, 2) as batcher:
        with pytest.raises(errors.InternalError, match="see its log"):
            await encode(batcher, made_of(1, 2, 255, 4, 5, 6))
        answer = await encode(batcher, made_of(7))
        assert not batcher.lost.is_set(), "its device is still there"
    assert answer.images[0].rows == 256


async def test_a_device_that_computes_nothing_any_more_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_args: object, **_more: object) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    encoder = Watched()
    async with Batcher(encoder, 2) as batcher:
        monkeypatch.setattr(torch, "ones", gone)
        with pytest.raises(errors.Unavailable, match="device cpu computes nothing any more"):
            await encode(batcher, made_of(255))
        await asyncio.wait_for(batcher.lost.wait(), 10)


async def test_memory_that_is_short_is_no_lost_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_more: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    async with Batcher(Watched(), 2) as batcher:
        monkeypatch.setattr(torch, "ones", full)
        with pytest.raises(errors.InternalError, match="see its log"):
            await encode(batcher, made_of(255))
        await encode(batcher, made_of(7))
        assert not batcher.lost.is_set()


async def test_values_that_are_not_finite_are_an_error() -> None:
    encoder = Watched()
    encoder._table[:] = float("inf")
    async with Batcher(encoder, 2) as batcher:
        with pytest.raises(errors.InternalError, match="infinite"):
            await encode(batcher, made_of(1))


async def test_routes_are_decided_over_the_whole_group() -> None:
    """Though its tiles came in batches of two."""
    policy = vir.Learned(0.5, 0.0)
    async with Batcher(Watched(), 2) as batcher:
        image = (await encode(batcher, made_of(*range(7)), policy=policy)).images[0]
    assert image.compressed == policy.route(torch.tensor(image.scores)).tolist()
    assert sum(image.compressed) == 3


async def test_warming_runs_the_largest_batch() -> None:
    encoder = Watched()
    async with Batcher(encoder, 5) as batcher:
        await batcher.warm()
    assert [len(batch) for batch in encoder.batches] == [5]

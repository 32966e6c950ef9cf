"""Batches of tiles: how they are formed, which calls are dropped, and which calls a failure affects."""

import asyncio
import gc
import math
import threading
import weakref
from itertools import chain

import numpy as np
import pytest
import torch
from torch import Tensor

from common import errors
from common.checkpoint import open_checkpoint
from tests.vision_worker import golden
from vision_worker.batcher import Batcher
from vision_worker.deadline import Deadline
from vision_worker.encoder import Placement
from vision_worker.metrics import Metrics
from vision_worker.models import vir
from vision_worker.models.fake import Fake
from vision_worker.preprocessing.tiling import Tiles
from vision_worker.tile_group import EncodedGroup

KEEP = vir.Fixed(False)
SIDE = 448


@pytest.fixture(autouse=True, params=[False, True], ids=["as on a CPU", "as on a GPU"])
def _asynchronous(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests run with one thread for tower and projectors, and with two that overlap."""
    monkeypatch.setattr(Placement, "is_asynchronous", property(lambda _: request.param))


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


async def encode(
    batcher: Batcher, *images: Tiles, policy: vir.Policy = KEEP, caller: str = "", deadline: Deadline | None = None
) -> EncodedGroup:
    return await batcher.encode(images, policy, torch.float32, caller, deadline)


async def wait_for_waiting_tiles(batcher: Batcher, tiles: int) -> None:
    async with asyncio.timeout(10):
        while len(batcher._queue) != tiles:
            await asyncio.sleep(0.005)


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


async def test_callers_take_turns() -> None:
    """Nine tenths of the tiles are A's; B's are computed among the first, although they came last."""
    encoder = RecordingEncoder()
    encoder.open.clear()
    async with Batcher(encoder, 2) as batcher:
        calls = [asyncio.create_task(encode(batcher, image_of(n, n + 1, n + 2), caller="A")) for n in range(0, 54, 3)]
        await wait_for_first_batch(encoder)
        await wait_for_waiting_tiles(batcher, 50)  # four are in batches
        calls += [asyncio.create_task(encode(batcher, image_of(100, 101, 102), caller="B")) for _ in range(2)]
        await wait_for_waiting_tiles(batcher, 56)
        encoder.open.set()
        await asyncio.gather(*calls)
    computed = list(chain(*encoder.batches))
    assert computed.index(102) < 4 + 2 * 6
    assert [value for value in computed if value < 100] == list(range(54)), "equal groups of a caller keep their order"


async def test_a_small_group_overtakes_a_large_one_of_the_same_caller() -> None:
    encoder = RecordingEncoder()
    encoder.open.clear()
    async with Batcher(encoder, 1) as batcher:
        large = asyncio.create_task(encode(batcher, image_of(*range(39))))
        await wait_for_first_batch(encoder)
        await wait_for_waiting_tiles(batcher, 37)
        small = asyncio.create_task(encode(batcher, image_of(100)))
        await wait_for_waiting_tiles(batcher, 38)
        encoder.open.set()
        await small
        assert not large.done()
        await large
    assert list(chain(*encoder.batches)).index(100) == 2


async def test_embeddings_do_not_depend_on_turns() -> None:
    async with Batcher(RecordingEncoder(), 4) as batcher:
        values = [tuple(range(n, n + 1 + n % 7)) for n in range(0, 200, 9)]
        alone = [await encode(batcher, image_of(*numbers)) for numbers in values]
        mixed = await asyncio.gather(*(encode(batcher, image_of(*v), caller=str(v[0] % 3)) for v in values))
    assert [bytes(group.images[0].data) for group in mixed] == [bytes(group.images[0].data) for group in alone]


async def test_pixels_are_released_once_their_batch_is_on_the_device() -> None:
    encoder = RecordingEncoder()
    encoder.open.clear()
    async with Batcher(encoder, 1) as batcher:
        first = asyncio.create_task(encode(batcher, image_of(0)))
        await wait_for_first_batch(encoder)
        image, cancelled = image_of(1, 2), image_of(7, 8)
        pixels = [weakref.ref(tiles.pixels) for tiles in (image, cancelled)]
        call, leaving = (batcher.encode([tiles], KEEP, torch.float32) for tiles in (image, cancelled))
        del image, cancelled
        leaving.cancel()
        await asyncio.sleep(0)
        encoder.open.set()
        await asyncio.gather(first, call)
        gc.collect()
        assert [reference() for reference in pixels] == [None, None]


# Deadlines


async def test_a_group_whose_deadline_has_passed_is_not_computed() -> None:
    encoder, metrics = RecordingEncoder(), Metrics()
    encoder.open.clear()
    async with Batcher(encoder, 1, metrics) as batcher:
        first = asyncio.create_task(encode(batcher, image_of(0)))
        await wait_for_first_batch(encoder)
        ready = asyncio.create_task(encode(batcher, image_of(1)))
        await wait_for_waiting_tiles(batcher, 0)
        deadline = Deadline(0)
        late = asyncio.create_task(encode(batcher, image_of(5, 6, 7), deadline=deadline))
        in_time = asyncio.create_task(encode(batcher, image_of(8), deadline=Deadline(3600)))
        await wait_for_waiting_tiles(batcher, 4)
        encoder.open.set()
        with pytest.raises(errors.DeadlineExceeded, match="3 tiles of the call cannot be computed in time"):
            await late
        await asyncio.gather(first, ready, in_time)
    assert encoder.batches == [[0], [1], [8]]
    assert deadline.missed
    assert metrics.registry.get_sample_value("dvd_vision_dropped_tiles_total") == 3
    assert metrics.registry.get_sample_value("dvd_vision_waiting_tiles") == 0


async def test_a_group_that_cannot_be_in_time_is_not_computed() -> None:
    encoder, metrics = RecordingEncoder(), Metrics()
    async with Batcher(encoder, 2, metrics) as batcher:
        await encode(batcher, image_of(0), deadline=Deadline(3600))
        batcher.times.record(2, 200.0)
        with pytest.raises(errors.DeadlineExceeded):
            await encode(batcher, image_of(1, 2, 3), deadline=Deadline(250))
        await encode(batcher, image_of(4, 5), deadline=Deadline(250))
    assert list(chain(*encoder.batches)) == [0, 4, 5]
    assert metrics.registry.get_sample_value("dvd_vision_dropped_tiles_total") == 3


async def test_an_estimate_does_not_drop_a_group_that_has_begun() -> None:
    encoder = RecordingEncoder()
    encoder.open.clear()
    async with Batcher(encoder, 1) as batcher:
        call = asyncio.create_task(encode(batcher, image_of(1, 2, 3, 4), deadline=Deadline(3600)))
        await wait_for_first_batch(encoder)
        batcher.times.record(1, 1e6)
        encoder.open.set()
        await call
    assert list(chain(*encoder.batches)) == [1, 2, 3, 4]


async def test_a_later_deadline_of_a_call_that_joins_counts() -> None:
    encoder = RecordingEncoder()
    encoder.open.clear()
    async with Batcher(encoder, 1) as batcher:
        first = asyncio.create_task(encode(batcher, image_of(0)))
        await wait_for_first_batch(encoder)
        ready = asyncio.create_task(encode(batcher, image_of(1)))
        await wait_for_waiting_tiles(batcher, 0)
        deadline = Deadline(0)
        joined = asyncio.create_task(encode(batcher, image_of(2), deadline=deadline))
        await wait_for_waiting_tiles(batcher, 1)
        deadline.extend(None)
        deadline.extend(1)
        encoder.open.set()
        await asyncio.gather(first, ready, joined)
    assert list(chain(*encoder.batches)) == [0, 1, 2]


async def test_batches_are_measured() -> None:
    async with Batcher(RecordingEncoder(), 2) as batcher:
        await batcher.warm_up()
        assert batcher.times.seconds_per_batch > 0
        warm = batcher.times.tiles_per_second
        assert warm > 0
        await encode(batcher, image_of(1, 2))
        async with asyncio.timeout(10):
            while batcher.times.tiles_per_second == warm:
                await asyncio.sleep(0.005)


# Failures


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


async def test_a_self_test_finds_a_device_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = RecordingEncoder()
    async with Batcher(encoder, 2) as batcher:
        await batcher.self_test()
        assert (encoder.batches, batcher.progress.completed, batcher.is_idle) == ([[0]], 1, True)
        assert not batcher.device_lost.is_set()
        monkeypatch.setattr("vision_worker.batcher._is_usable", lambda _: False)
        encoder.POISON = 0
        await batcher.self_test()
        await asyncio.wait_for(batcher.device_lost.wait(), 10)


async def test_infinite_values_are_an_error() -> None:
    encoder = RecordingEncoder()
    encoder._table[:] = float("inf")
    async with Batcher(encoder, 2) as batcher:
        with pytest.raises(errors.InternalError, match="infinite"):
            await encode(batcher, image_of(1))


async def test_infinite_values_of_a_group_fail_no_other_group_of_its_batch() -> None:
    encoder = RecordingEncoder()
    encoder._block = lambda value, compressed: torch.full((256, 256), math.inf if value == bad else 1.0)  # type: ignore[method-assign]
    bad = int(encoder.forward(encoder.stage([image_of(1).pixels[0]]))[0])
    encoder.open.clear()
    async with Batcher(encoder, 3) as batcher:
        first = asyncio.create_task(encode(batcher, image_of(9)))
        await wait_for_first_batch(encoder)
        second = asyncio.create_task(encode(batcher, image_of(8)))
        async with asyncio.timeout(10):
            while len(batcher._on_device) < 2:
                await asyncio.sleep(0.005)
        calls = [asyncio.create_task(encode(batcher, image_of(value))) for value in (2, 1, 3)]
        await wait_for_waiting_tiles(batcher, 3)
        encoder.open.set()
        results = await asyncio.gather(first, second, *calls, return_exceptions=True)
    assert [type(result) for result in results] == [*[EncodedGroup] * 3, errors.InternalError, EncodedGroup]


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
    assert [len(batch) for batch in encoder.batches] == [5, 5], "the second one is measured"
    assert batcher.times.tiles_per_second > 0


class OneByOneEncoder(RecordingEncoder):
    """Computes a batch for each `release` of its semaphore."""

    def __init__(self) -> None:
        super().__init__()
        self.may_compute = threading.Semaphore(0)

    def forward(self, pixels: Tensor) -> Tensor:
        features = super().forward(pixels)
        assert self.may_compute.acquire(timeout=10)
        return features


async def test_a_caller_waits_for_the_tile_in_service_and_for_no_other_one() -> None:
    """Beside a caller that always has two calls in flight, which is a gateway's window on a slow tower."""
    encoder = OneByOneEncoder()
    async with Batcher(encoder, 1) as batcher:
        batcher.times.seconds_per_batch = 1.0  # no batch is staged in advance

        async def send(caller: str, value: int) -> None:
            while True:
                await encode(batcher, image_of(value), caller=caller)

        senders = [asyncio.create_task(send(caller, value)) for caller, value in (("many", 1), ("many", 1), ("one", 2))]
        for number in range(30):
            async with asyncio.timeout(10):
                while len(encoder.batches) <= number or len(batcher._queue) < 2:
                    await asyncio.sleep(0.001)
            batcher.times.seconds_per_batch = 1.0
            encoder.may_compute.release()
        for sender in senders:
            sender.cancel()
        encoder.may_compute.release(10)
    order = "".join(str(value) for (value,) in encoder.batches[4:30])
    assert "11" not in order

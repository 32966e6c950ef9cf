"""The order in which calls are sent to vision workers, and which requests are refused."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from common import errors
from protos import embeddings_pb2, vision_pb2
from server.metrics import Metrics
from server.vision_queue import EncodeJob, VisionQueue
from server.workers.clients import VisionClient
from server.workers.pool import Pool
from server.workers.worker import VisionWorker
from tests.server.fakes.vision_worker import checkpoint_description

CHECKPOINT = checkpoint_description()
DESCRIPTION = vision_pb2.VisionDescription(checkpoint=CHECKPOINT, batch_tiles=8)
WINDOW = 32


class Bench:
    """A queue in front of vision workers that are never called, and the calls that have been sent."""

    def __init__(self, workers: int = 1, max_wait: float = 4.0) -> None:
        self.pool = Pool("vision", lambda address: VisionWorker(VisionClient(address)), "No vision worker is available.")
        for worker in self.pool.set_members("", [f"unix:/nowhere/{i}" for i in range(workers)]):
            worker.mark_up(DESCRIPTION)
        self.metrics, self.now = Metrics(), 0.0
        self.queue = VisionQueue(self.pool, max_wait, self.metrics, lambda: self.now)
        self.sent: list[str] = []
        self._end: dict[str, asyncio.Event] = {}

    async def call(
        self,
        name: str,
        tiles: int,
        caller: str = "caller",
        deadline: float = 100.0,
        request: str = "",
        dtype: int = embeddings_pb2.FLOAT32,
    ) -> VisionWorker:
        """Wait for a turn, and take it until `end` is called."""
        end = self._end[name] = asyncio.Event()
        job = EncodeJob(name, CHECKPOINT, caller, request or name, tiles, deadline, dtype)
        async with self.queue.worker(job) as worker:
            self.sent.append(name)
            await end.wait()
            return worker

    async def end(self, name: str) -> None:
        self._end[name].set()
        await settle()

    def set_speed(self, tiles_per_second: float) -> None:
        """Let all workers have been saturated at this speed until now."""
        now = time.monotonic()
        for worker in self.pool.workers:
            for second in range(100):
                worker.throughput.update(now - 100 + second, tiles_per_second, is_saturated=second < 99)

    async def occupy(self, tasks: asyncio.TaskGroup, calls: int, caller: str = "caller") -> None:
        """Let the workers encode 10 tiles a second, and a caller send calls of 30 tiles, `call 0` and so on."""
        self.set_speed(10)
        for number in range(calls):
            tasks.create_task(self.call(f"call {number}", 30, caller))
        await settle()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture
async def tasks() -> AsyncIterator[asyncio.TaskGroup]:
    """Calls that are cancelled at the end."""
    async with AsyncExitStack() as stack:
        group = await stack.enter_async_context(asyncio.TaskGroup())
        yield group
        for task in list(group._tasks):
            task.cancel()


async def test_a_worker_gets_no_more_tiles_than_its_window(tasks: asyncio.TaskGroup) -> None:
    bench = Bench()
    for number in range(4):
        tasks.create_task(bench.call(f"call {number}", 13))
        await settle()
    assert bench.sent == ["call 0", "call 1"]
    assert bench.queue.waiting_tiles == bench.metrics.registry.get_sample_value("dvd_queue_tiles") == 26
    await bench.end("call 0")
    assert bench.sent == ["call 0", "call 1", "call 2"]
    assert bench.pool.workers[0].tiles == 26


async def test_a_call_larger_than_the_window_is_sent_alone(tasks: asyncio.TaskGroup) -> None:
    bench = Bench()
    tasks.create_task(bench.call("huge", 400))
    tasks.create_task(bench.call("small", 1))
    await settle()
    assert bench.sent == ["huge"]
    await bench.end("huge")
    assert bench.sent == ["huge", "small"]


async def test_a_small_request_overtakes_the_images_of_a_large_one(tasks: asyncio.TaskGroup) -> None:
    bench = Bench()
    for number in range(4):
        tasks.create_task(bench.call(f"large {number}", WINDOW, request="large"))
    await settle()
    tasks.create_task(bench.call("small", WINDOW, request="small"))
    await settle()
    assert bench.sent == ["large 0"]
    await bench.end("large 0")
    await bench.end("large 1")
    assert bench.sent[:3] == ["large 0", "large 1", "small"]


async def test_a_caller_with_much_to_do_does_not_delay_another(tasks: asyncio.TaskGroup) -> None:
    bench = Bench()
    for number in range(20):
        tasks.create_task(bench.call(f"many {number}", WINDOW, "many"))
    await settle()
    tasks.create_task(bench.call("one", WINDOW, "one"))
    tasks.create_task(bench.call("one, too", WINDOW, "one"))
    await settle()
    assert bench.sent == ["many 0", "one"], "the first call of a caller does not wait for the window"
    await bench.end("many 0")
    await bench.end("one")
    assert "one, too" in bench.sent[2:4]


async def test_equal_keys_go_to_one_worker_and_all_workers_are_used(tasks: asyncio.TaskGroup) -> None:
    bench = Bench(workers=3)
    first = [tasks.create_task(bench.call(f"key {number}", 1)) for number in range(30)]
    await settle()
    assert len(bench.sent) == 30
    assert all(worker.tiles for worker in bench.pool.workers)
    for name in list(bench.sent):
        await bench.end(name)
    again = [tasks.create_task(bench.call(f"key {number}", 1)) for number in range(30)]
    await settle()
    for name in bench.sent[30:]:
        await bench.end(name)
    assert [task.result() for task in first] == [task.result() for task in again]


async def test_a_call_that_is_cancelled_while_it_waits_leaves(tasks: asyncio.TaskGroup) -> None:
    bench = Bench()
    tasks.create_task(bench.call("first", WINDOW))
    await settle()
    waiting = asyncio.ensure_future(bench.call("cancelled", WINDOW))
    tasks.create_task(bench.call("next", WINDOW))
    await settle()
    waiting.cancel()
    await settle()
    assert bench.queue.waiting_tiles == WINDOW
    await bench.end("first")
    assert bench.sent == ["first", "next"]


async def test_a_call_that_is_cancelled_at_its_turn_gives_its_tiles_back() -> None:
    bench = Bench()
    first = asyncio.ensure_future(bench.call("first", WINDOW))
    await settle()
    second = asyncio.ensure_future(bench.call("second", WINDOW))
    await settle()
    first.cancel()
    await asyncio.sleep(0)
    second.cancel()
    await settle()
    assert bench.pool.workers[0].tiles == 0
    assert not bench.queue._tiles_by_caller


async def test_only_workers_of_the_checkpoint_are_used(tasks: asyncio.TaskGroup) -> None:
    bench = Bench(workers=2)
    other = checkpoint_description(fingerprint="0" * 64)
    bench.pool.workers[0].mark_up(vision_pb2.VisionDescription(checkpoint=other))
    for number in range(10):
        tasks.create_task(bench.call(f"key {number}", 1))
    await settle()
    assert [worker.tiles for worker in bench.pool.workers] == [0, 10]
    bench.pool.workers[1].mark_down("stopped")
    with pytest.raises(errors.Unavailable, match="checkpoint"):
        await bench.call("none", 1)


async def test_only_workers_that_deliver_the_dtype_are_used(tasks: asyncio.TaskGroup) -> None:
    bench = Bench(workers=2)  # the first one, of an older version, names no dtypes
    narrow = [embeddings_pb2.FLOAT32, embeddings_pb2.INT8]
    bench.pool.workers[1].mark_up(vision_pb2.VisionDescription(checkpoint=CHECKPOINT, batch_tiles=8, embedding_dtypes=narrow))
    for number in range(10):
        tasks.create_task(bench.call(f"key {number}", 1, dtype=embeddings_pb2.INT8))
    await settle()
    assert [worker.tiles for worker in bench.pool.workers] == [0, 10]
    for number in range(20):
        tasks.create_task(bench.call(f"wide {number}", 1))
    await settle()
    assert bench.pool.workers[0].tiles > 0, "every worker delivers float32"
    with pytest.raises(errors.Unavailable, match="in fp8"):
        await bench.call("none", 1, dtype=embeddings_pb2.FP8)


async def test_waiting_calls_fail_if_the_last_worker_is_gone(tasks: asyncio.TaskGroup) -> None:
    bench = Bench()
    tasks.create_task(bench.call("first", WINDOW))
    await settle()
    waiting = asyncio.ensure_future(bench.call("waiting", WINDOW))
    await settle()
    bench.pool.workers[0].mark_down("stopped")
    bench.queue.dispatch()
    with pytest.raises(errors.Unavailable):
        await waiting


async def test_a_call_whose_deadline_cannot_be_met_is_dropped_before_it_is_sent(tasks: asyncio.TaskGroup) -> None:
    bench = Bench()
    bench.set_speed(10)
    tasks.create_task(bench.call("first", WINDOW))
    await settle()
    late = asyncio.ensure_future(bench.call("late", 20, deadline=6.0))
    await settle()
    bench.now = 4.5  # 1.5 s are left for 2 s of work
    await bench.end("first")
    with pytest.raises(errors.DeadlineExceeded):
        await late
    assert bench.sent == ["first"]
    assert bench.metrics.registry.get_sample_value("dvd_tiles_dropped_total") == 20


async def test_everything_is_admitted_while_the_speed_is_unknown(tasks: asyncio.TaskGroup) -> None:
    bench = Bench()
    for number in range(50):
        bench.queue.admit("caller", WINDOW, 1.0)
        tasks.create_task(bench.call(f"call {number}", WINDOW))
        await settle()


async def test_a_request_that_would_wait_too_long_is_refused_with_the_time_to_wait(tasks: asyncio.TaskGroup) -> None:
    bench = Bench(max_wait=4.0)
    await bench.occupy(tasks, calls=2)
    with pytest.raises(errors.Overloaded, match=r"wait for about 6\.0 s, but the queue is bounded to 4 s") as error_info:
        bench.queue.admit("caller", 10, 100.0)
    assert error_info.value.retry_after == pytest.approx(2.0, rel=0.01)
    await bench.end("call 0")
    bench.queue.admit("caller", 10, 100.0)


async def test_the_speed_that_this_process_gets_counts_and_not_the_whole_speed_of_a_worker(tasks: asyncio.TaskGroup) -> None:
    """Other gateways, and other processes of this one, take their share of it, and have queues of their own."""
    bench = Bench(max_wait=4.0)
    (worker,) = bench.pool.workers
    worker.mark_up(vision_pb2.VisionDescription(checkpoint=CHECKPOINT, batch_tiles=8, tiles_per_second=10))
    tasks.create_task(bench.call("first", 30))
    await settle()
    bench.queue.admit("caller", 1, 100.0)
    assert bench.queue.wait_seconds("caller", 1) == pytest.approx(3.0)
    bench.set_speed(5)
    assert bench.queue.wait_seconds("caller", 1) == pytest.approx(6.0, rel=0.1)
    assert worker.window == 9, "a second of this process's share, and at least a batch"
    with pytest.raises(errors.Overloaded):
        bench.queue.admit("caller", 1, 100.0)


async def test_another_caller_is_admitted_beside_one_that_fills_the_queue(tasks: asyncio.TaskGroup) -> None:
    bench = Bench(max_wait=4.0)
    await bench.occupy(tasks, calls=3, caller="many")
    with pytest.raises(errors.Overloaded):
        bench.queue.admit("many", 5, 100.0)
    bench.queue.admit("one", 5, 100.0)


async def test_a_request_whose_deadline_is_nearer_than_its_turn_is_refused(tasks: asyncio.TaskGroup) -> None:
    bench = Bench(max_wait=60.0)
    await bench.occupy(tasks, calls=2)
    bench.queue.admit("caller", 10, 7.5)
    with pytest.raises(errors.Overloaded, match=r"its deadline leaves 5\.0 s") as error_info:
        bench.queue.admit("caller", 10, 6.0)
    assert error_info.value.retry_after == pytest.approx(1.0, rel=0.01)


SPARE_SPEED = 5.0


class BenchWithSpare(Bench):
    """A worker of 10 tiles a second, and a spare one of 5."""

    def __init__(self) -> None:
        super().__init__(workers=2, max_wait=1000.0)
        self.regular, self.spare = self.pool.workers
        self.mark_up(self.regular, 10.0)
        self.mark_up(self.spare, SPARE_SPEED, spare=True)

    @staticmethod
    def mark_up(worker: VisionWorker, speed: float, spare: bool = False) -> None:
        worker.mark_up(vision_pb2.VisionDescription(checkpoint=CHECKPOINT, batch_tiles=8, tiles_per_second=speed, spare=spare))


async def test_a_spare_worker_gets_nothing_while_the_others_have_room(tasks: asyncio.TaskGroup) -> None:
    bench = BenchWithSpare()
    for number in range(20):
        tasks.create_task(bench.call(f"call {number}", 3, f"caller {number % 2}"))
        await settle()
        assert (bench.regular.tiles, bench.spare.tiles) == (3, 0)
        await bench.end(f"call {number}")


async def test_a_spare_worker_gets_one_job_that_it_ends_before_the_others_would_end_all(tasks: asyncio.TaskGroup) -> None:
    bench = BenchWithSpare()
    for number in range(8):  # the last four wait, for 1.2 s of work
        tasks.create_task(bench.call(f"call {number}", 3))
        await settle()
    assert (bench.regular.tiles, bench.spare.tiles, bench.queue.waiting_tiles) == (9, 3, 12)
    tasks.create_task(bench.call("call 8", 3))
    await settle()
    assert bench.spare.tiles == 3, "it has a job"
    await bench.end(bench.sent[-1])
    assert bench.spare.tiles == 3, "and gets the next one"


async def test_a_spare_worker_gets_nothing_that_it_would_end_later_than_the_others(tasks: asyncio.TaskGroup) -> None:
    bench = BenchWithSpare()
    bench.mark_up(bench.spare, 1.0, spare=True)
    for number in range(8):
        tasks.create_task(bench.call(f"call {number}", 3))
        await settle()
    assert (bench.regular.tiles, bench.spare.tiles, bench.queue.waiting_tiles) == (9, 0, 15)


async def test_a_job_whose_deadline_a_spare_worker_cannot_meet_waits_for_the_others(tasks: asyncio.TaskGroup) -> None:
    bench = BenchWithSpare()
    for number in range(3):
        tasks.create_task(bench.call(f"first {number}", 3))
    await settle()
    for number in range(5):
        tasks.create_task(bench.call(f"call {number}", 3, deadline=0.5))
    await settle()
    assert (bench.spare.tiles, bench.queue.waiting_tiles) == (0, 15)


async def test_a_spare_worker_does_all_if_there_is_no_other(tasks: asyncio.TaskGroup) -> None:
    bench = BenchWithSpare()
    bench.regular.mark_down("stopped")
    tasks.create_task(bench.call("call", 3))
    await settle()
    assert bench.spare.tiles == 3
    assert bench.queue.tiles_per_second == pytest.approx(SPARE_SPEED)


async def test_a_call_that_failed_elsewhere_does_not_hold_the_queue_for_a_busy_spare_worker(tasks: asyncio.TaskGroup) -> None:
    bench = BenchWithSpare()
    bench.spare.add_tiles(3)
    job = EncodeJob("again", CHECKPOINT, "caller", "again", 3, 100.0, embeddings_pb2.FLOAT32)
    with pytest.raises(errors.Unavailable, match="Only spare vision workers are left"):
        async with bench.queue.worker(job, exclude=[bench.regular]):
            pass
    bench.spare.remove_tiles(3)
    async with bench.queue.worker(job, exclude=[bench.regular]) as worker:
        assert worker is bench.spare


async def test_tiles_at_a_spare_worker_delay_nobody(tasks: asyncio.TaskGroup) -> None:
    bench = BenchWithSpare()
    for number in range(8):
        tasks.create_task(bench.call(f"call {number}", 3))
        await settle()
    assert (bench.regular.tiles, bench.spare.tiles, bench.queue.waiting_tiles) == (9, 3, 12)
    assert bench.queue.total_wait_seconds == pytest.approx(2.1)
    for number in range(8):
        await bench.end(bench.sent[number])
    assert bench.queue.total_wait_seconds == 0.0
    assert bench.spare.tiles == bench.regular.tiles == 0


async def test_a_spare_worker_is_as_fast_as_it_reports_last(tasks: asyncio.TaskGroup) -> None:
    """What was measured while its cores were busy says nothing about now."""
    bench = BenchWithSpare()
    bench.set_speed(0.3)
    assert bench.spare.tiles_per_second == pytest.approx(SPARE_SPEED)


async def test_what_a_spare_worker_does_is_not_promised_to_callers() -> None:
    assert BenchWithSpare().queue.tiles_per_second == pytest.approx(10.0)

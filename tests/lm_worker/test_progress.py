"""When an engine counts as stalled, with a clock of the test's own."""

from collections.abc import Mapping

from lm_worker.engine_processes import ProcessState
from lm_worker.progress import Progress


def processes(ticks: int, *, stopped: bool = False) -> Mapping[int, ProcessState]:
    """An engine core, which waits, and a worker that has used some CPU time."""
    return {10: ProcessState(1, False, 5), 11: ProcessState(10, stopped, ticks)}


class Engine:
    """Observes a `Progress` once a second."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.now, self.ticks = progress, 0.0, 0

    def pass_seconds(
        self, seconds: int, unfinished: int = 0, *, busy: bool = False, answers: bool = False, stopped: bool = False
    ) -> list[str | None]:
        """Return what was observed in each second."""
        observed = []
        for _ in range(seconds):
            self.now += 1
            self.ticks += busy
            if answers:
                self.progress.record_message(self.now)
            observed.append(self.progress.stall(self.now, unfinished, processes(self.ticks, stopped=stopped)))
        return observed


def engine(timeout: float = 0, **options: float) -> Engine:
    return Engine(Progress(0.0, timeout, **options))


def test_an_engine_that_answers_is_healthy() -> None:
    assert set(engine().pass_seconds(600, answers=True)) == {None}


def test_an_idle_engine_that_neither_answers_nor_computes_is_stalled_and_recovers() -> None:
    hung = engine()
    hung.pass_seconds(5, answers=True)
    observed = hung.pass_seconds(4)
    assert observed[:2] == [None, None]
    assert observed[-1] == "it has not answered for 4 s, and its processes neither use nor wait for a core"
    assert hung.pass_seconds(1, answers=True) == [None]


def test_a_busy_engine_is_never_stalled_however_long_its_step_takes() -> None:
    assert set(engine().pass_seconds(3600, unfinished=4, busy=True)) == {None}


def test_a_hung_engine_with_requests_is_stalled_within_5_seconds() -> None:
    hung = engine()
    hung.pass_seconds(10, unfinished=4, busy=True)
    assert hung.pass_seconds(5, unfinished=4)[-1] is not None


def test_a_gpu_may_compute_for_longer_while_its_processes_sleep() -> None:
    gpu = engine(busy_silence_seconds=10.0)
    assert set(gpu.pass_seconds(9, unfinished=1)) == {None}
    assert gpu.pass_seconds(2, unfinished=1)[-1] is not None


def test_a_stopped_process_is_named_although_another_one_answers() -> None:
    observed = engine().pass_seconds(5, answers=True, stopped=True)
    assert observed[:2] == [None, None]
    assert observed[-1] == "its process 11 has been stopped for 4 s, by SIGSTOP or a debugger"


def test_a_process_that_a_debugger_stops_for_a_moment_is_healthy() -> None:
    sampled = engine()
    for _ in range(10):
        assert sampled.pass_seconds(1, answers=True, stopped=True) == [None]
        assert sampled.pass_seconds(1, answers=True) == [None]


def test_an_engine_without_known_processes_is_never_silent() -> None:
    progress = Progress(0.0, 0)
    assert {progress.stall(float(second), 1, {}) for second in range(100)} == {None}


def test_silence_while_this_process_itself_was_stopped_proves_nothing() -> None:
    resumed = engine()
    resumed.pass_seconds(1, answers=True)
    resumed.now += 600
    assert resumed.pass_seconds(1, unfinished=1) == [None]


def test_late_observations_do_not_count_as_silence() -> None:
    """Between them the engine answered, but this process had no core to note it."""
    starved = engine()
    for _ in range(3):
        starved.pass_seconds(1, answers=True)
        starved.now += 1.8
        assert starved.pass_seconds(1, unfinished=1) == [None]


def test_an_engine_that_hangs_is_found_by_late_observations_too() -> None:
    hung, observed = engine(), []
    for _ in range(4):
        hung.now += 1.8
        observed += hung.pass_seconds(1, unfinished=1)
    assert observed[:2] == [None, None]
    assert observed[-1] is not None


def test_late_observations_count_neither_as_time_without_a_token_nor_as_a_stop() -> None:
    starved = engine(timeout=60)
    for _ in range(20):
        starved.now += 9
        assert starved.pass_seconds(1, unfinished=1, answers=True)[-1] is None
    stopped = engine()
    stopped.pass_seconds(1, answers=True, stopped=True)
    stopped.now += 60
    assert stopped.pass_seconds(1, answers=True, stopped=True) == [None]
    assert stopped.pass_seconds(2, answers=True, stopped=True)[-1] is not None


def test_an_engine_that_waits_for_a_core_is_not_stalled() -> None:
    progress = Progress(0.0, 0)
    waiting = {10: ProcessState(1, False, 5, is_runnable=True)}
    assert {progress.stall(float(second), 1, waiting) for second in range(100)} == {None}


def test_requests_without_a_token_are_stalled_after_the_timeout_although_the_engine_computes() -> None:
    livelocked = engine(timeout=60)
    observed = livelocked.pass_seconds(61, unfinished=3, busy=True, answers=True)
    assert set(observed[:59]) == {None}
    assert observed[-1] == "no token for 61 s with 3 requests running (--progress-timeout)"


def test_tokens_restart_the_timeout() -> None:
    slow = engine(timeout=60)
    for _ in range(10):
        slow.pass_seconds(59, unfinished=1, busy=True)
        slow.progress.record_token(slow.now)
    assert slow.pass_seconds(59, unfinished=1, busy=True)[-1] is None


def test_idle_time_is_no_time_without_a_token() -> None:
    idle = engine(timeout=60)
    idle.pass_seconds(600, answers=True)
    assert idle.pass_seconds(59, unfinished=1, answers=True)[-1] is None


def test_requests_that_give_up_do_not_make_a_starved_engine_healthy() -> None:
    starved = engine(timeout=60)
    starved.pass_seconds(61, unfinished=1, answers=True)
    assert starved.pass_seconds(5, answers=True)[-1] == "it has generated no token since --progress-timeout passed"
    starved.progress.record_token(starved.now)
    assert starved.pass_seconds(1, answers=True) == [None]

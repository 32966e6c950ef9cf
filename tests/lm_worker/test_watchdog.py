"""A language worker whose engine makes no progress, with the real vLLM. `test_progress.py` tests the rules."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.serving import gone, pid_of
from tests.lm_worker.workers import Worker, language_worker, wait_ready

_MAX_SECONDS = 60.0
"""Upper bound on a busy machine; about 4 s on an idle one."""


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with language_worker() as started:
        wait_ready(started)
        yield started


def until_last_line_contains(worker: Worker, text: str) -> None:
    """Its lines pass through another process, so they arrive a moment later."""
    worker.wait_until(lambda: text in worker.lines.splitlines()[-1], _MAX_SECONDS)


def stall_and_resume(worker: Worker) -> None:
    os.kill(worker.core, signal.SIGSTOP)
    worker.wait_until(lambda: worker.health() == 503, _MAX_SECONDS)
    until_last_line_contains(worker, "s, by SIGSTOP or a debugger")
    os.kill(worker.core, signal.SIGCONT)
    worker.wait_until(lambda: worker.health() == 200, _MAX_SECONDS)
    until_last_line_contains(worker, "the engine makes progress again after")


def test_an_idle_engine_that_is_stopped_is_unhealthy_until_it_continues(worker: Worker) -> None:
    assert worker.health() == 200
    stall_and_resume(worker)


def test_so_is_one_with_requests_and_they_end_when_it_continues(worker: Worker) -> None:
    with ThreadPoolExecutor() as threads:
        answer = threads.submit(worker.served.chat, "Hello", max_tokens=1500, ignore_eos=True)
        worker.wait_until(lambda: worker.served.metric("vllm:num_requests_running") == 1)
        stall_and_resume(worker)
        assert answer.result().json["usage"]["completion_tokens"] == 1500


def _burn(until: float) -> None:
    while time.monotonic() < until:
        pass


def test_a_busy_engine_on_a_busy_machine_stays_healthy(worker: Worker) -> None:
    """Long prefills, which have no token in common, while other processes use all cores."""
    lines = len(worker.lines.splitlines())
    burning = [multiprocessing.get_context("spawn").Process(target=_burn, args=(time.monotonic() + 15,)) for _ in range(4)]
    for process in burning:
        process.start()
    with ThreadPoolExecutor() as threads:
        prompts = [f"{number} " * 1500 for number in range(10, 18)]
        answers = [threads.submit(worker.served.chat, prompt, max_tokens=2) for prompt in prompts]
        while not all(answer.done() for answer in answers):
            assert worker.health() == 200, worker.lines
            time.sleep(0.1)
    assert [answer.result().status for answer in answers] == [200] * len(prompts), answers[0].result().text
    for process in burning:
        process.join()
    assert worker.lines.splitlines()[lines:] == []


def test_what_it_asks_the_engine_appears_in_no_metric(worker: Worker) -> None:
    names = ("vllm:request_success_total", "vllm:prompt_tokens_total", "vllm:prefix_cache_queries_total")
    before = [worker.served.metric(name) for name in names]
    time.sleep(5)
    assert [worker.served.metric(name) for name in names] == before


def test_a_worker_whose_sink_is_killed_ends_with_a_line(worker: Worker) -> None:
    """It is not about progress, but needs a worker that no other test needs any more."""
    os.kill(pid_of(worker.served.mark, "lm_worker.sink"), signal.SIGKILL)
    assert worker.served.process.wait(_MAX_SECONDS) == 1, worker.lines
    assert "dvd language: the sink ended with exit status -9; stopping" in worker.lines
    assert "Traceback" not in worker.lines
    assert gone(worker.served.mark, 30) == []

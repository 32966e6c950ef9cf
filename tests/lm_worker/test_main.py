"""A language worker as a process: how it starts, and how it stops before it is ready."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lm_worker.shared_memory import folder_of
from tests.e2e.serving import GOLDEN, QUICK, START_TIMEOUT, Served, gone, pid_of, processes, start, stop
from tests.ports import free_port


@pytest.fixture
def address() -> str:
    return f"127.0.0.1:{free_port()}"


@pytest.fixture
def starting(address: str) -> Iterator[Served]:
    checkpoint, http = GOLDEN / "flash-qwen3/checkpoint", f"127.0.0.1:{free_port()}"
    arguments = ("language", checkpoint, f"--listen={address}", f"--http={http}", "--", *QUICK)
    worker = start(*arguments)
    yield worker
    stop(worker)


def _wait_until(condition: Callable[[], bool], worker: Served) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while not condition():
        assert worker.process.poll() is None, worker.lines
        assert time.monotonic() < deadline, worker.lines
        time.sleep(0.05)


def _is_spawned_and_imports(process: Path) -> bool:
    """Whether `multiprocessing` has started a process, which has got as far as loading torch."""
    try:
        return b"multiprocessing.spawn" in (process / "cmdline").read_bytes() and "libtorch" in (process / "maps").read_text()
    except OSError:
        return False


def _assert_stopped(worker: Served, address: str, signal_name: str) -> None:
    assert worker.process.wait(START_TIMEOUT) == 0, worker.lines
    assert f"dvd language: stopped by {signal_name} before it was ready" in worker.lines
    assert "Traceback" not in worker.lines
    assert "sink ready" not in worker.lines
    assert not folder_of(address).exists()
    assert gone(worker.mark, 30) == []


def test_sigterm_while_the_engine_loads_ends_the_worker_with_one_line(starting: Served, address: str) -> None:
    _wait_until(lambda: "starting the engine" in starting.lines, starting)

    starting.process.send_signal(signal.SIGTERM)

    _assert_stopped(starting, address, "SIGTERM")


def test_sigkill_while_the_engine_loads_leaves_no_process_and_no_file(starting: Served, address: str) -> None:
    """The process that computes is still importing then."""
    _wait_until(lambda: any(_is_spawned_and_imports(path) for path in processes(starting.mark)), starting)

    os.kill(pid_of(starting.mark, "-m\0lm_worker\0"), signal.SIGKILL)

    assert starting.process.wait(START_TIMEOUT) == -signal.SIGKILL, starting.lines
    assert gone(starting.mark, 60) == []
    assert [path for path in folder_of(address).rglob("*") if path.is_file()] == []


def test_ctrl_c_before_vllm_is_imported_ends_the_worker_with_one_line(starting: Served, address: str) -> None:
    _wait_until(folder_of(address).exists, starting)

    starting.process.send_signal(signal.SIGINT)

    _assert_stopped(starting, address, "SIGINT")

"""Decoder processes: their limits, what they inherit, and how they end."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from common import errors
from common.decoder_processes import Call, DecoderKind, DecoderProcesses
from common.metrics import DecoderMetrics
from common.sandbox import has_landlock

MODULE = "tests.common.decoder_module"
KIND = DecoderKind(MODULE, "image", errors.InvalidImage)
LONG_SECONDS = 100.0


@pytest.fixture
def metrics() -> DecoderMetrics:
    return DecoderMetrics(CollectorRegistry())


@pytest.fixture
def processes(metrics: DecoderMetrics) -> Iterator[DecoderProcesses]:
    with DecoderProcesses(KIND, 64 << 20, metrics) as running:
        yield running


def ends(metrics: DecoderMetrics) -> dict[str, float]:
    """Return how many processes ended, by the reasons for which any did."""
    samples = [sample for family in metrics.ends.collect() for sample in family.samples if sample.name.endswith("_total")]
    return {sample.labels["reason"]: sample.value for sample in samples if sample.value}


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def run(
    processes: DecoderProcesses, action: str, data: bytes = b"", seconds: float = LONG_SECONDS, call: Call | None = None
) -> Any:
    return processes.run({"action": action}, data, seconds, lambda result, output: (result, bytes(output)), call)


def test_a_process_serves_one_file_after_the_other(processes: DecoderProcesses) -> None:
    data = os.urandom(3 << 20)
    for part in (data, b"", data[:5]):
        assert run(processes, "copy", part) == ({"size": len(part)}, part)
    assert len(processes.pids) == 1
    assert processes.cpu_seconds() > 0


def test_an_output_cannot_be_cut(processes: DecoderProcesses) -> None:
    """A process that could cut it would end its parent with SIGBUS."""
    assert run(processes, "cut", b"abc") == ({"error": "PermissionError"}, b"abc")


def test_a_short_output_after_a_long_one_is_short(processes: DecoderProcesses) -> None:
    for size in (100_000, 10, 40 << 20, 10, 0):
        assert run(processes, "copy", b"x" * size)[1] == b"x" * size


def test_errors_for_the_caller_keep_their_class_and_others_do_not(processes: DecoderProcesses, metrics: DecoderMetrics) -> None:
    with pytest.raises(errors.ImageTooLarge, match="too many pixels"):
        run(processes, "too_large")
    with pytest.raises(errors.InvalidImage, match="pretends"):
        run(processes, "unauthorized")
    assert ends(metrics) == {}


@pytest.mark.parametrize(
    ("action", "reason", "factor", "message"),
    [
        ("spin", "cpu", 1000, "takes more than 0.2 s of CPU time to decode .--decode-timeout"),
        ("sleep", "time", 5, "makes no progress: it was not decoded within 1 s .--decode-timeout"),
    ],
)
def test_a_file_that_takes_too_long_ends_its_process(
    processes: DecoderProcesses,
    metrics: DecoderMetrics,
    monkeypatch: pytest.MonkeyPatch,
    action: str,
    reason: str,
    factor: int,
    message: str,
) -> None:
    monkeypatch.setattr("common.decoder_processes._WALL_FACTOR", factor)
    with pytest.raises(errors.InvalidImage, match=message):
        run(processes, action, b"12345", seconds=0.2)
    assert ends(metrics) == {reason: 1}
    assert processes.pids == []
    assert run(processes, "copy", b"next")[1] == b"next"


def test_a_file_may_take_long_while_its_process_gets_some_of_a_busy_cpu(
    processes: DecoderProcesses, metrics: DecoderMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.decoder_processes._WALL_FACTOR", 0.01)
    started = time.monotonic()
    assert run(processes, "work", b"3")[0] == {}
    assert time.monotonic() - started > 2 * 0.01 * LONG_SECONDS
    assert ends(metrics) == {}


def test_a_process_that_is_stopped_makes_no_progress(
    processes: DecoderProcesses, metrics: DecoderMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(processes, "copy")
    monkeypatch.setattr("common.decoder_processes._WALL_FACTOR", 0.01)
    call = Call()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run, processes, "spin", call=call)
        wait_until(lambda: call.cpu_seconds() > 1.5)
        os.kill(processes.pids[0], signal.SIGSTOP)
        with pytest.raises(errors.InvalidImage, match="makes no progress"):
            future.result(60)
    assert ends(metrics) == {"time": 1}


@pytest.mark.parametrize("action", ["allocate", "write"])
def test_a_file_that_needs_too_much_memory_ends_its_process(
    processes: DecoderProcesses, metrics: DecoderMetrics, action: str
) -> None:
    with pytest.raises(errors.InvalidImage, match="needs more than 67108864 bytes of memory to decode .--decode-memory"):
        run(processes, action)
    assert ends(metrics) == {"memory": 2}, "a process whose memory earlier files have used up would be no fault of this one"
    assert run(processes, "copy", b"next")[1] == b"next"


def test_a_process_that_ends_by_itself_is_replaced_once(processes: DecoderProcesses, metrics: DecoderMetrics) -> None:
    with pytest.raises(errors.InvalidImage, match="it ends the decoder"):
        run(processes, "exit")
    assert ends(metrics) == {"crash": 2}


def test_a_process_that_is_killed_between_two_files_is_replaced(processes: DecoderProcesses, metrics: DecoderMetrics) -> None:
    run(processes, "copy")
    (pid,) = processes.pids
    os.kill(pid, signal.SIGKILL)
    assert run(processes, "copy", b"next")[1] == b"next"
    assert ends(metrics) == {"crash": 1}
    assert processes.pids != [pid]


def test_an_abandoned_call_ends_its_process(processes: DecoderProcesses, metrics: DecoderMetrics) -> None:
    call = Call()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run, processes, "spin", call=call)
        wait_until(lambda: call.cpu_seconds() > 0)
        call.abandon()
        with pytest.raises(CancelledError):
            future.result(60)
    assert ends(metrics) == {"abandoned": 1}


def test_a_call_that_is_abandoned_before_or_after_it_runs_ends_no_other(
    processes: DecoderProcesses, metrics: DecoderMetrics
) -> None:
    early, late = Call(), Call()
    early.abandon()
    with pytest.raises(CancelledError):
        run(processes, "copy", call=early)
    assert run(processes, "copy", b"x", call=late)[1] == b"x"
    pids = processes.pids
    late.abandon()
    assert run(processes, "copy", b"y")[1] == b"y"
    assert processes.pids == pids


def test_a_call_that_is_abandoned_when_its_reply_is_here_ends_no_other(
    processes: DecoderProcesses, metrics: DecoderMetrics
) -> None:
    class AbandonedAtItsEnd(Call):
        @contextlib.contextmanager
        def served_by(self, process: Any) -> Iterator[None]:
            with super().served_by(process):
                yield
                self.abandon()

    assert run(processes, "copy", b"x", call=AbandonedAtItsEnd())[1] == b"x"
    assert run(processes, "copy", b"y")[1] == b"y"
    assert ends(metrics) == {"abandoned": 1}


def test_all_processes_end_with_their_owner(metrics: DecoderMetrics) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(2) as pool:
        with DecoderProcesses(KIND, 64 << 20, metrics) as processes:
            run(processes, "copy")
            futures = [pool.submit(run, processes, "spin") for _ in range(2)]
            wait_until(lambda: len(processes.pids) == 2 and processes.cpu_seconds() > 0.1)
            pids = processes.pids
        for future in futures:
            with pytest.raises(CancelledError):
                future.result(60)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert set(os.listdir("/proc/self/fd")) == before
    assert ends(metrics) == {}
    with pytest.raises(CancelledError):
        run(processes, "copy")


def test_a_process_has_no_secrets_no_sockets_and_cannot_open_any(
    processes: DecoderProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVD_API_KEY", "secret")
    found = run(processes, "inspect")[0]
    assert "secret" not in json.dumps(found["environment"])
    assert [link.split(":")[0] for link in found["descriptors"].values()].count("socket") == 1
    assert found["denied"] == ["socket", "program", "signal", "queued signal", *["memory of its parent"] * has_landlock()]
    assert found["core_bytes"] == 0


def test_signals_to_a_group_do_not_end_a_process(processes: DecoderProcesses) -> None:
    run(processes, "copy")
    (pid,) = processes.pids
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    assert run(processes, "copy", b"x")[1] == b"x"
    assert processes.pids == [pid]


def test_several_threads_have_a_process_each(processes: DecoderProcesses) -> None:
    barrier = threading.Barrier(3)

    def work(i: int) -> bool:
        barrier.wait(60)
        return all(run(processes, "copy", bytes([i]) * 1000)[1] == bytes([i]) * 1000 for _ in range(20))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, range(3)))
    assert len(processes.pids) <= 3


def test_a_module_that_does_not_start_is_no_fault_of_the_file(metrics: DecoderMetrics) -> None:
    kind = DecoderKind("tests.common.no_such_module", "image", errors.InvalidImage)
    with DecoderProcesses(kind, 64 << 20, metrics) as processes, pytest.raises(errors.InternalError, match="does not start"):
        run(processes, "copy")

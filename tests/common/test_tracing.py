"""Trace events: their format, and what happens if they cannot be written."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.tracing import Trace, read_trace


def test_events_have_the_format_of_trace_viewers(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "traces", "vision")
    before = time.monotonic()
    with trace.span("encode", tiles=4):
        time.sleep(0.01)
    trace.record("deliver", 2.0, 2.5)
    trace.flush()
    deliver, encode = read_trace(tmp_path / "traces")
    assert (deliver["name"], deliver["ts"], deliver["dur"], deliver["ph"]) == ("deliver", 2_000_000, 500_000, "X")
    assert (encode["cat"], encode["args"]) == ("vision", {"tiles": 4})
    assert before * 1e6 <= encode["ts"] + 1
    assert encode["dur"] >= 10_000


def test_a_block_that_raises_is_recorded(tmp_path: Path) -> None:
    trace = Trace(tmp_path, "gateway")
    with pytest.raises(ValueError, match="no"), trace.span("fetch"):
        raise ValueError("no")
    trace.flush()
    assert [event["name"] for event in read_trace(tmp_path)] == ["fetch"]


def test_a_write_error_ends_tracing_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trace = Trace(tmp_path / "traces", "vision")
    (tmp_path / "traces").rmdir()
    for number in range(500):
        with trace.span("encode", number=number):
            pass
    trace.flush()
    assert [record.message.partition(":")[0] for record in caplog.records] == ["tracing ends"]


def test_no_event_of_concurrent_threads_is_lost(tmp_path: Path) -> None:
    trace = Trace(tmp_path, "vision")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: trace.record("prepare", i, i + 1, image=i), range(1000)))
    trace.flush()
    assert sorted(event["args"]["image"] for event in read_trace(tmp_path)) == list(range(1000))
    (file,) = tmp_path.iterdir()
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trace = Trace(None, "vision")
    with trace.span("encode"):
        pass
    trace.flush()
    assert list(tmp_path.iterdir()) == []

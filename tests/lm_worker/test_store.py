"""The store: embeddings are complete or absent, memory is bounded, and nothing in use is evicted."""

import errno
import os
import time
from pathlib import Path

import pytest

from common import errors
from common.embedding import HEADER_SIZE, Header
from lm_worker.pins import Pins
from lm_worker.shared_memory import create_folder, is_expected, map_embedding, read_header
from lm_worker.store import Store

ROWS, WIDTH = 4, 8


def header(key: str, rows: int = ROWS) -> Header:
    return Header(key, "f" * 64, "float32", rows, WIDTH)


SIZE = HEADER_SIZE + header("a").length


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    create_folder(tmp_path / "store")
    return tmp_path / "store"


def put(store: Store, key: str, fill: int = 1) -> None:
    with store.writing(header(key)) as incoming:
        incoming.add(bytes([fill]) * header(key).length)


def test_an_embedding_is_read_back_as_it_was_written(folder: Path) -> None:
    store = Store(folder, budget=10 * SIZE, lease=0)
    put(store, "a", 7)
    mapped_header, mapping = map_embedding(folder / "a")
    assert mapped_header == header("a") == read_header(folder / "a")
    assert mapping[HEADER_SIZE:] == bytes([7]) * mapped_header.length
    assert (store.rows("a"), store.rows("b"), store.used) == (ROWS, 0, SIZE)


def test_a_failed_write_leaves_nothing_behind(folder: Path) -> None:
    store = Store(folder, budget=10 * SIZE, lease=0)
    with pytest.raises(ZeroDivisionError), store.writing(header("a")):
        raise ZeroDivisionError
    assert store.used == 0
    assert store.rows("a") == 0
    assert not (folder / "a").exists()
    assert not list((folder / ".incoming").iterdir())


def test_a_full_file_system_raises_sink_full_before_values_are_received(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(folder, budget=10 * SIZE, lease=0)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", fail)
        with pytest.raises(errors.SinkFull, match="The file system of .* is full"), store.writing(header("a")):
            pytest.fail("the file is not allocated")
    assert store.used == 0
    assert not list((folder / ".incoming").iterdir())
    put(store, "a")
    assert store.rows("a") == ROWS


def test_the_least_recently_used_embedding_is_evicted_first(folder: Path) -> None:
    store = Store(folder, budget=2 * SIZE, lease=0)
    put(store, "a")
    put(store, "b")
    store.rows("a")
    put(store, "c")
    assert [store.rows(key) for key in "abc"] == [ROWS, 0, ROWS]
    assert store.used == 2 * SIZE
    assert store.evictions == 1


def test_a_pinned_embedding_is_not_evicted(folder: Path) -> None:
    store, pins = Store(folder, budget=SIZE, lease=0), Pins(folder)
    put(store, "a")
    assert pins.pin("a")
    with pytest.raises(errors.SinkFull):
        put(store, "b")
    pins.unpin("a")
    put(store, "b")
    assert store.rows("a") == 0


def test_an_embedding_within_its_lease_is_not_evicted(folder: Path) -> None:
    store = Store(folder, budget=SIZE, lease=60)
    put(store, "a")
    with pytest.raises(errors.SinkFull):
        put(store, "b")
    assert store.rows("a") == ROWS


def read_once(folder: Path, key: str) -> None:
    """Pin and unpin until the file's change time has moved on: the file system's clock is coarse."""
    pins, before = Pins(folder), (folder / key).stat().st_ctime_ns
    while (folder / key).stat().st_ctime_ns == before:
        assert pins.pin(key)
        pins.unpin(key)


def test_an_embedding_requested_once_is_evictable_after_one_read(folder: Path) -> None:
    store = Store(folder, budget=SIZE, lease=60)
    for key in "abc":
        assert store.rows(key) == 0  # requested before it is delivered, as the gateway does
        put(store, key)
        read_once(folder, key)
    assert store.rows("c") == ROWS  # requested again: it stays until that request has read it, too
    with pytest.raises(errors.SinkFull):
        put(store, "d")
    read_once(folder, "c")
    put(store, "d")
    assert (store.rows("c"), store.evictions) == (0, 3)


@pytest.mark.parametrize("second_before_delivery", [False, True])
def test_an_embedding_requested_twice_stays_after_one_read(folder: Path, second_before_delivery: bool) -> None:
    store = Store(folder, budget=SIZE, lease=60)
    store.rows("a")
    if second_before_delivery:
        store.rows("a")
    put(store, "a")
    if not second_before_delivery:
        store.rows("a")
    read_once(folder, "a")
    with pytest.raises(errors.SinkFull):
        put(store, "b")
    assert store.rows("a") == ROWS


def test_pending_deliveries_expire(folder: Path) -> None:
    store = Store(folder, budget=SIZE, lease=0)
    for number in range(100):
        store.rows(str(number))
    assert len(store._pending) < 3


def test_an_embedding_larger_than_the_budget_names_the_option(folder: Path) -> None:
    with pytest.raises(errors.SinkFull, match="--sink-bytes"):
        put(Store(folder, budget=SIZE - 1, lease=0), "a")


def test_create_folder_removes_the_embeddings_of_a_predecessor(folder: Path) -> None:
    put(Store(folder, budget=SIZE, lease=0), "a")
    create_folder(folder)
    assert not (folder / "a").exists()


def test_an_embedding_is_expected_until_it_is_delivered(folder: Path) -> None:
    store = Store(folder, budget=10 * SIZE, lease=0)
    assert not is_expected(folder, "a")
    assert store.rows("a") == 0
    assert not is_expected(folder, "a"), "nobody has said that it will be delivered"
    store.rows("a", expect_seconds=60)
    assert store.rows("a") == 0
    assert is_expected(folder, "a"), "another lookup does not end it"
    put(store, "a")
    assert not is_expected(folder, "a")
    assert store.rows("a", expect_seconds=60) == ROWS
    assert not list((folder / ".expected").iterdir())


def test_what_does_not_arrive_in_time_is_not_expected_any_more(folder: Path) -> None:
    store = Store(folder, budget=10 * SIZE, lease=0)
    store.rows("a", expect_seconds=1e-3)
    time.sleep(0.01)
    assert not is_expected(folder, "a")
    store.rows("b", expect_seconds=60)
    assert [file.name for file in (folder / ".expected").iterdir()] == ["b"], "old marks are removed"


def test_a_key_that_is_no_file_name_is_not_expected(folder: Path) -> None:
    store = Store(folder, budget=10 * SIZE, lease=0)
    with pytest.raises(errors.InvalidRequest):
        store.rows("../a", expect_seconds=60)
    assert not (folder / "a").exists()

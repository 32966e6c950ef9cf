"""The store: complete or not at all, bounded, and nothing evicted that is in use."""

from pathlib import Path

import pytest

from common import errors
from common.embedding import HEADER_SIZE, Header
from lm_worker.store import Holder, Store, create_folder, map_embedding, read_header

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


def test_what_was_written_is_read_back(folder: Path) -> None:
    store = Store(folder, budget=10 * SIZE, lease=0)
    put(store, "a", 7)
    found, mapped = map_embedding(folder / "a")
    assert found == header("a") == read_header(folder / "a")
    assert mapped[HEADER_SIZE:] == bytes([7]) * found.length
    assert (store.rows("a"), store.rows("b"), store.used) == (ROWS, 0, SIZE)


def test_a_broken_write_leaves_nothing(folder: Path) -> None:
    store = Store(folder, budget=10 * SIZE, lease=0)
    with pytest.raises(ZeroDivisionError), store.writing(header("a")):
        raise ZeroDivisionError
    assert store.used == 0
    assert store.rows("a") == 0
    assert not (folder / "a").exists()
    assert not list((folder / "incoming").iterdir())


def test_a_full_file_system_is_a_full_sink(folder: Path) -> None:
    store = Store(folder, budget=10 * SIZE, lease=0)
    (folder / "incoming" / "1").symlink_to("/dev/full")
    with pytest.raises(errors.SinkFull, match="file system is full"):
        put(store, "a")
    assert store.used == 0
    put(store, "a")
    assert store.rows("a") == ROWS


def test_the_least_recently_used_goes_first(folder: Path) -> None:
    store = Store(folder, budget=2 * SIZE, lease=0)
    put(store, "a")
    put(store, "b")
    store.rows("a")
    put(store, "c")
    assert [store.rows(key) for key in "abc"] == [ROWS, 0, ROWS]
    assert store.used == 2 * SIZE
    assert store.evictions == 1


def test_what_a_reader_holds_stays(folder: Path) -> None:
    store, holder = Store(folder, budget=SIZE, lease=0), Holder(folder)
    put(store, "a")
    assert holder.hold("a")
    with pytest.raises(errors.SinkFull):
        put(store, "b")
    holder.release("a")
    put(store, "b")
    assert store.rows("a") == 0


def test_what_was_just_delivered_or_asked_for_stays(folder: Path) -> None:
    store = Store(folder, budget=SIZE, lease=60)
    put(store, "a")
    with pytest.raises(errors.SinkFull):
        put(store, "b")
    assert store.rows("a") == ROWS


def read_once(folder: Path, key: str) -> None:
    """Held and let go of, until the file system's clock has seen it."""
    holder, before = Holder(folder), (folder / key).stat().st_ctime_ns
    while (folder / key).stat().st_ctime_ns == before:
        assert holder.hold(key)
        holder.release(key)


def test_what_was_asked_for_once_and_read_goes(folder: Path) -> None:
    store = Store(folder, budget=SIZE, lease=60)
    for key in "abc":
        assert store.rows(key) == 0  # asked for before it was made, as a request does
        put(store, key)
        read_once(folder, key)
    assert store.rows("c") == ROWS  # asked for again: it stays until that one has read it, too
    with pytest.raises(errors.SinkFull):
        put(store, "d")
    read_once(folder, "c")
    put(store, "d")
    assert (store.rows("c"), store.evictions) == (0, 3)


@pytest.mark.parametrize("before", [0, 1])
def test_what_two_have_asked_for_stays_when_one_has_read_it(folder: Path, before: int) -> None:
    store = Store(folder, budget=SIZE, lease=60)
    store.rows("a")
    if before:
        store.rows("a")
    put(store, "a")
    if not before:
        store.rows("a")
    read_once(folder, "a")
    with pytest.raises(errors.SinkFull):
        put(store, "b")
    assert store.rows("a") == ROWS


def test_wishes_that_never_come_true_are_forgotten(folder: Path) -> None:
    store = Store(folder, budget=SIZE, lease=0)
    for number in range(100):
        store.rows(str(number))
    assert len(store._wishes) < 3


def test_what_can_never_fit_says_how_to_make_it_fit(folder: Path) -> None:
    with pytest.raises(errors.SinkFull, match="--sink-bytes"):
        put(Store(folder, budget=SIZE - 1, lease=0), "a")


def test_holds_are_counted_and_survive_eviction(folder: Path) -> None:
    store, holder = Store(folder, budget=SIZE, lease=0), Holder(folder)
    put(store, "a", 9)
    assert holder.hold("a")
    assert holder.hold("a")
    (folder / "a").unlink()
    holder.release("a")
    assert holder.held("a")
    assert map_embedding(holder.path("a"))[1][HEADER_SIZE] == 9
    holder.release("a")
    assert not holder.held("a")
    assert not holder.path("a").exists()
    assert not holder.hold("a")


def test_two_readers_hold_one_embedding_each_for_itself(folder: Path) -> None:
    put(Store(folder, budget=SIZE, lease=0), "a", 9)
    first, second = Holder(folder), Holder(folder)
    assert first.hold("a")
    assert second.hold("a")
    (folder / "a").unlink()
    first.release("a")
    assert map_embedding(second.path("a"))[1][HEADER_SIZE] == 9
    second.release("a")
    assert not list((folder / "held").iterdir())


@pytest.mark.parametrize("key", ["", "../a", "a/b", "a\0", "x" * 129, "é"])
def test_no_key_leaves_the_folder(folder: Path, key: str) -> None:
    with pytest.raises(errors.InvalidRequest):
        Holder(folder).hold(key)


def test_a_predecessors_memory_is_given_back(folder: Path) -> None:
    put(Store(folder, budget=SIZE, lease=0), "a")
    create_folder(folder)
    assert not (folder / "a").exists()

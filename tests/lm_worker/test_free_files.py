"""Files of evicted embeddings are reused, but only when no other process could notice."""

import contextlib
import errno
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import errors
from common.embedding import HEADER_SIZE, Header
from lm_worker.free_files import FreeFiles
from lm_worker.pins import Pins
from lm_worker.shared_memory import create_folder, map_embedding
from lm_worker.slot_file import SlotFile
from lm_worker.store import Store

WIDTH = 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    create_folder(tmp_path / "store")
    return tmp_path / "store"


def header(key: str, rows: int = 4) -> Header:
    return Header(key, "f" * 64, "float32", rows, WIDTH)


SIZE = HEADER_SIZE + header("a").length


def put(store: Store, key: str, fill: int, rows: int = 4) -> int:
    """Store an embedding of equal bytes. Returns the inode of its file."""
    with store.writing(header(key, rows)) as incoming:
        incoming.add(bytes([fill]) * header(key, rows).length)
    return (store.folder / key).stat().st_ino


def stored_bytes(store: Store) -> int:
    return sum(file.stat().st_size for file in store.folder.iterdir() if file.is_file())


def is_unshared(path: Path) -> bool:
    file = SlotFile(path)
    try:
        return file.is_unshared()
    finally:
        file.close()


def free_files(store: Store) -> list[int]:
    return [file.stat().st_size for file in (store.folder / ".free").iterdir()]


def test_the_next_embedding_gets_the_file_of_the_evicted_one(folder: Path) -> None:
    store = Store(folder, budget=SIZE, lease=0)
    inodes = {put(store, f"k{i}", i) for i in range(5)}
    assert len(inodes) == 1
    assert [file.name for file in folder.iterdir() if not file.name.startswith(".")] == ["k4"]
    assert map_embedding(folder / "k4")[1][:] == header("k4").pack() + bytes([4]) * header("k4").length
    assert (store.used, store.evictions, free_files(store)) == (SIZE, 4, [])


@pytest.mark.parametrize(("before", "after"), [(4, 3), (3, 4), (1, 50), (50, 30)])
def test_a_file_of_another_size_is_cut_or_extended(folder: Path, before: int, after: int) -> None:
    store = Store(folder, budget=HEADER_SIZE + 50 * WIDTH * 4, lease=0)
    first = put(store, "a", 1, before)
    second = put(store, "b", 2, after) if max(before, after) == 50 else None
    if second is None:  # both fit: evict by hand
        store._evict("a")
        second = put(store, "b", 2, after)
    assert first == second
    assert map_embedding(folder / "b")[1][:] == header("b", after).pack() + b"\2" * header("b", after).length


def test_a_mapped_file_is_not_reused_although_its_descriptor_and_pin_are_gone(folder: Path) -> None:
    store, pins = Store(folder, budget=SIZE, lease=0), Pins(folder)
    first = put(store, "a", 1)
    assert pins.pin("a")
    _, mapping = map_embedding(pins.path("a"))
    pins.unpin("a")
    assert put(store, "b", 2) != first
    assert mapping[HEADER_SIZE:] == b"\1" * header("a").length
    assert free_files(store) == []
    mapping.close()


def test_a_pin_at_the_last_moment_keeps_the_file(folder: Path) -> None:
    """The scheduler may pin a file between the sink's look at its links and the eviction."""
    store, pins = Store(folder, budget=10 * SIZE, lease=0), Pins(folder)
    put(store, "a", 1)
    assert pins.pin("a")
    store._evict("a")
    put(store, "b", 2)
    assert map_embedding(pins.path("a"))[1][HEADER_SIZE:] == b"\1" * header("a").length
    assert free_files(store) == []


OPENER = """
import sys, time
file = open(sys.argv[1], sys.argv[2])
print(flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("mode", ["rb", "r+b"])
def test_a_file_that_another_process_has_open_is_not_reused_until_the_process_ends(folder: Path, mode: str) -> None:
    path = folder / "file"
    path.write_bytes(b"values")
    process = subprocess.Popen([sys.executable, "-c", OPENER, path, mode], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    assert not is_unshared(path)
    process.kill()
    process.wait()
    process.stdout.close()
    assert is_unshared(path)


def test_a_writable_mapping_counts_as_an_open_file(folder: Path) -> None:
    path = folder / "file"
    path.write_bytes(b"values")
    with path.open("r+b") as file:
        mapping = mmap.mmap(file.fileno(), 0)
    assert not is_unshared(path)
    mapping.close()
    assert is_unshared(path)


def test_the_file_of_a_failed_delivery_is_not_reused(folder: Path) -> None:
    """Its sender may be about to open it, or write into it."""
    store = Store(folder, budget=SIZE, lease=0)
    with contextlib.ExitStack() as late_sender:
        with pytest.raises(errors.InvalidRequest), store.writing(header("a")) as incoming:
            late = late_sender.enter_context(incoming.path.open("r+b", buffering=0))
        put(store, "b", 2)
        late.write(bytes(SIZE))
    assert map_embedding(folder / "b")[1][:] == header("b").pack() + b"\2" * header("b").length


def test_free_files_and_embeddings_together_keep_to_the_budget(folder: Path) -> None:
    budget = HEADER_SIZE + 100 * WIDTH * 4
    store = Store(folder, budget=budget, lease=0)
    for i, rows in enumerate([100, 1, 60, 10, 99, 3, 2, 50, 50, 80, 1]):
        put(store, f"k{i}", i, rows)
        files = [file for file in folder.rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) <= budget
        assert store.used == sum(file.stat().st_size for file in files if not file.parent.name.startswith("."))


def test_a_file_that_is_much_too_large_is_not_used_up_for_a_small_embedding(folder: Path) -> None:
    free = FreeFiles(folder)
    path = folder / "large"
    path.write_bytes(bytes(1000))
    free.add(path, 1000)
    assert not free.take(folder / "small", 499)
    assert free.take(folder / "half", 500)
    assert (free.bytes, (folder / "half").stat().st_size) == (0, 1000)


def test_an_embedding_that_was_removed_by_hand_is_no_free_file(folder: Path) -> None:
    free = FreeFiles(folder)
    free.add(folder / "missing", 1000)
    assert free.bytes == 0
    assert not free.take(folder / "next", 1000)


def test_a_free_file_that_was_removed_by_hand_is_forgotten(folder: Path) -> None:
    store = Store(folder, budget=2 * SIZE, lease=0)
    for i in range(4):
        put(store, f"k{i}", i)
        for file in (folder / ".free").iterdir():
            file.unlink()
    put(store, "large", 9, rows=9)
    assert stored_bytes(store) == store.used


def test_without_descriptors_evicted_embeddings_still_give_back_their_budget(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_worker.store._DESCRIPTORS_SHARE", 0)  # no embedding's file stays open
    store = Store(folder, budget=2 * SIZE, lease=0)
    put(store, "a", 1)
    put(store, "b", 2)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr("lm_worker.slot_file.os.open", refuse)
        for name in ("c", "d", "e"):
            with pytest.raises(OSError, match="Too many open files"):
                put(store, name, 3)
    put(store, "f", 4)
    put(store, "g", 5)
    assert stored_bytes(store) == store.used == 2 * SIZE
    assert free_files(store) == []


def test_where_the_system_grants_no_leases_nothing_is_reused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("leases are not supported")

    monkeypatch.setattr("fcntl.fcntl", refuse)
    store = Store(folder, budget=SIZE, lease=0)
    for i in range(3):
        put(store, f"k{i}", i)
        assert free_files(store) == []
    assert os.listdir(folder / ".incoming") == []

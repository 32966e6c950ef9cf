"""A file stays open and mapped from one embedding to the next, and its bytes are those of the last write."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import errors
from common.embedding import HEADER_SIZE, Header
from lm_worker.incoming import IncomingFile
from lm_worker.pins import Pins
from lm_worker.shared_memory import create_folder, map_embedding
from lm_worker.slot_file import SlotFile
from lm_worker.store import Store

PAGE = 4096


@pytest.fixture
def file(tmp_path: Path) -> Iterator[SlotFile]:
    opened = SlotFile(tmp_path / "file")
    yield opened
    opened.close()


def read(file: SlotFile) -> bytes:
    with file.map() as whole:
        return bytes(whole)


@pytest.mark.parametrize("sizes", [[PAGE, 3 * PAGE], [3 * PAGE, PAGE, 2 * PAGE], [100, 50, 100_000, 7]])
def test_the_mapping_follows_the_size_of_the_file(file: SlotFile, tmp_path: Path, sizes: list[int]) -> None:
    for number, size in enumerate(sizes):
        file.resize(size)
        file.write(bytes([number + 1]) * size, 0)
        assert (file.size, (tmp_path / "file").stat().st_size) == (size, size)
        assert read(file) == (tmp_path / "file").read_bytes() == bytes([number + 1]) * size
    assert (tmp_path / "file").stat().st_blocks * 512 >= sizes[-1], "all pages are allocated"


def test_its_own_mapping_is_no_other_user_and_a_readers_is(file: SlotFile, tmp_path: Path) -> None:
    header = Header("k", "f" * 64, "float32", 1, 1)
    file.resize(HEADER_SIZE + 4)
    file.write(header.pack(), 0)
    read(file)
    assert file.is_unshared()
    _, mapping = map_embedding(tmp_path / "file")
    assert not file.is_unshared()
    mapping.close()
    assert file.is_unshared()
    os.link(tmp_path / "file", tmp_path / "pin")
    assert not file.is_unshared()


def test_a_view_outlives_the_close(file: SlotFile) -> None:
    """A task that was cancelled, or a thread, may still have one."""
    file.resize(PAGE)
    file.write(b"\1" * PAGE, 0)
    view = file.map()
    file.close()
    assert bytes(view) == b"\1" * PAGE


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def put(store: Store, key: str, rows: int = 4) -> None:
    header = Header(key, "f" * 64, "float32", rows, 8)
    with store.writing(header) as incoming:
        incoming.path.open("r+b").close()  # its sender is done
        with incoming.map() as whole:
            whole[HEADER_SIZE:] = bytes(header.length)
        incoming.mark_placed(header.length)


def test_descriptors_of_embeddings_are_bounded_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_folder(tmp_path / "store")
    before, pins = descriptors(), Pins(tmp_path / "store")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (32, 32))
    store = Store(tmp_path / "store", budget=10 * (HEADER_SIZE + 128), lease=0)
    for number in range(30):
        put(store, f"k{number}")
        assert descriptors() - before <= 8
    assert len(store) == 10
    assert pins.pin("k29")
    put(store, "large", rows=200 // 8 * 4)
    assert descriptors() - before <= 8
    del store
    assert descriptors() == before


def incoming_file(file: SlotFile, path: Path, values: int = 10) -> IncomingFile:
    return IncomingFile(path, Header("k", "f" * 64, "float32", 1, values), file)


def test_each_part_is_checked_once_it_is_placed(file: SlotFile, tmp_path: Path) -> None:
    incoming = incoming_file(file, tmp_path / "file")
    nan = b"\xff\xff\xff\xff"
    file.write(bytes(16) + nan, HEADER_SIZE)
    incoming.mark_placed(18)
    assert incoming.bytes_unchecked == 18
    incoming.check_placed()
    assert incoming.bytes_unchecked == 2, "a value that is placed in part is checked later"
    incoming.mark_placed(20)
    with pytest.raises(errors.InvalidRequest, match="infinite or undefined"):
        incoming.check_placed()


@pytest.mark.parametrize("counts", [[41], [20, 19], [40, 0]])
def test_what_is_placed_only_grows_and_has_the_declared_length(file: SlotFile, tmp_path: Path, counts: list[int]) -> None:
    incoming = incoming_file(file, tmp_path / "file")
    for count in counts[:-1]:
        incoming.mark_placed(count)
    with pytest.raises(errors.InvalidRequest, match="bytes of values were placed"):
        incoming.mark_placed(counts[-1])


def test_an_embedding_that_is_placed_in_part_is_not_complete(file: SlotFile, tmp_path: Path) -> None:
    incoming = incoming_file(file, tmp_path / "file")
    incoming.mark_placed(36)
    incoming.check_placed()
    with pytest.raises(errors.InvalidRequest, match="The delivery has 36 bytes; its header declares 40"):
        incoming.finish()


@pytest.mark.parametrize("size", [HEADER_SIZE, HEADER_SIZE + 39, HEADER_SIZE + 50])
def test_a_file_whose_size_the_sender_has_changed_is_refused(file: SlotFile, tmp_path: Path, size: int) -> None:
    incoming = incoming_file(file, tmp_path / "file")
    os.truncate(tmp_path / "file", size)
    incoming.mark_placed(20)
    with pytest.raises(errors.InvalidRequest, match=f"size of the embedding's file to {size} bytes"):
        incoming.check_placed()


def test_a_header_that_the_sender_has_overwritten_is_refused(file: SlotFile, tmp_path: Path) -> None:
    incoming = incoming_file(file, tmp_path / "file")
    file.write(b"DVDX", 0)
    incoming.mark_placed(40)
    with pytest.raises(errors.InvalidRequest, match="overwritten the header"):
        incoming.finish()

"""Pins: counted per key, per reader, and independent of the sink's own file."""

import os
from pathlib import Path

import pytest

from common import errors
from common.embedding import HEADER_SIZE, Header
from lm_worker.pins import Pins
from lm_worker.shared_memory import create_folder, map_embedding
from lm_worker.store import Store

HEADER = Header("a", "f" * 64, "float32", 4, 8)
FIRST_VALUE = 9


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store's folder with the embedding `a`."""
    folder = tmp_path / "store"
    create_folder(folder)
    with Store(folder, budget=1 << 20, lease=0).writing(HEADER) as incoming:
        incoming.add(bytes([FIRST_VALUE]) * HEADER.length)
    return folder


def test_pins_are_counted_and_survive_eviction(folder: Path) -> None:
    pins = Pins(folder)
    assert pins.pin("a")
    assert pins.pin("a")
    (folder / "a").unlink()
    pins.unpin("a")
    assert pins.is_pinned("a")
    assert map_embedding(pins.path("a"))[1][HEADER_SIZE] == FIRST_VALUE
    pins.unpin("a")
    assert not pins.is_pinned("a")
    assert not pins.path("a").exists()
    assert not pins.pin("a")


def test_two_readers_pin_one_embedding_independently(folder: Path) -> None:
    first, second = Pins(folder), Pins(folder)
    assert first.pin("a")
    assert second.pin("a")
    (folder / "a").unlink()
    first.unpin("a")
    assert map_embedding(second.path("a"))[1][HEADER_SIZE] == FIRST_VALUE
    second.unpin("a")
    assert not list((folder / ".pinned").iterdir())


def test_an_embedding_that_is_evicted_while_it_is_linked_is_not_pinned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel has found the file by its name when the sink takes it away, to overwrite it."""
    link = os.link

    def link_late(embedding: Path, pin: Path) -> None:
        os.rename(embedding, folder / ".free" / "0")
        link(folder / ".free" / "0", pin)

    monkeypatch.setattr(os, "link", link_late)
    pins = Pins(folder)
    assert not pins.pin("a")
    assert not pins.is_pinned("a")
    assert not list((folder / ".pinned").iterdir())


def test_an_embedding_that_was_delivered_anew_meanwhile_is_pinned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link, tries = os.link, []

    def link_late_once(embedding: Path, pin: Path) -> None:
        tries.append(pin)
        link(embedding, pin)
        if len(tries) == 1:
            data = embedding.read_bytes()
            os.rename(embedding, folder / ".free" / "0")
            embedding.write_bytes(data)

    monkeypatch.setattr(os, "link", link_late_once)
    pins = Pins(folder)
    assert pins.pin("a")
    assert len(tries) == 2
    assert pins.path("a").samefile(folder / "a")


@pytest.mark.parametrize("key", ["", "../a", "a/b", "a\0", "x" * 129, "é"])
def test_a_key_that_is_no_file_name_is_rejected(folder: Path, key: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="not an embedding key"):
        Pins(folder).pin(key)

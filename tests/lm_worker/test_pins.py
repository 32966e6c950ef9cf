"""Pins: counted per key, per reader, and independent of the sink's own file."""

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


@pytest.mark.parametrize("key", ["", "../a", "a/b", "a\0", "x" * 129, "é"])
def test_a_key_that_is_no_file_name_is_rejected(folder: Path, key: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="not an embedding key"):
        Pins(folder).pin(key)

"""Pages of new files are allocated at once where the system allows huge pages, and nothing changes where it does not."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.embedding import HEADER_SIZE, Header
from lm_worker import huge_pages
from lm_worker.huge_pages import allocate_huge_pages
from lm_worker.shared_memory import create_folder, map_embedding
from lm_worker.store import Store

HUGE = 2 << 20


@pytest.fixture(autouse=True)
def forget_setting() -> Iterator[None]:
    huge_pages._are_allowed.cache_clear()
    yield
    huge_pages._are_allowed.cache_clear()


def allow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: str) -> None:
    (tmp_path / "setting").write_text(setting)
    monkeypatch.setattr(huge_pages, "_SETTING", tmp_path / "setting")


@pytest.mark.parametrize(
    ("setting", "is_allowed"),
    [
        ("always within_size [advise] never deny force", True),
        ("[always] within_size advise never deny force", True),
        ("always within_size advise [never] deny force", False),
        ("always within_size advise never [deny] force", False),
        ("", False),
    ],
)
@pytest.mark.parametrize(("size", "whole"), [(HUGE - 1, 0), (HUGE, HUGE), (3 * HUGE + 5, 3 * HUGE)])
def test_whole_huge_pages_are_allocated_if_the_system_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, is_allowed: bool, size: int, whole: int
) -> None:
    allow(monkeypatch, tmp_path, setting)
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.ftruncate(file.fileno(), size)
        allocate_huge_pages(file.fileno())
        assert os.fstat(file.fileno()).st_blocks * 512 == (whole if is_allowed else 0)


def test_a_system_without_the_setting_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_SETTING", tmp_path / "missing")
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.ftruncate(file.fileno(), HUGE)
        allocate_huge_pages(file.fileno())
        assert os.fstat(file.fileno()).st_blocks == 0


def test_a_file_that_cannot_be_mapped_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, tmp_path, "[advise]")
    (tmp_path / "file").write_bytes(bytes(HUGE))
    with (tmp_path / "file").open("rb") as file:
        allocate_huge_pages(file.fileno())


def test_an_embedding_in_huge_pages_is_read_back_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, tmp_path, "[advise]")
    header = Header("a", "f" * 64, "float32", 1200, 1000)
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="dvd-test-") as name:
        create_folder(folder := Path(name) / "store")
        values = bytes(range(100)) * (header.length // 100)
        with Store(folder, budget=16 << 20, lease=0).writing(header) as incoming:
            incoming.add(values)
        assert map_embedding(folder / "a")[1][HEADER_SIZE:] == values

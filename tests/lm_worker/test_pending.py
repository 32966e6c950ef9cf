"""Pending deliveries: however many keys are looked up, and for however long, what is left in shared memory is bounded."""

import time
from pathlib import Path

import pytest

from common import errors
from lm_worker import pending
from lm_worker.pending import PendingDeliveries
from lm_worker.shared_memory import create_folder, is_expected


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    create_folder(tmp_path / "store")
    return tmp_path / "store"


def marks(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / ".expected").iterdir())


def test_the_key_requested_longest_ago_is_forgotten_with_its_mark(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending, "_MAX_KEYS", 3)
    deliveries = PendingDeliveries(folder, lease=60)
    for key in "abc":
        deliveries.record_request(key, 60)
    deliveries.record_request("a", 60)
    assert marks(folder) == ["a", "b", "c"]
    deliveries.record_request("d", 60)
    assert marks(folder) == ["a", "c", "d"]
    for number in range(100):
        deliveries.record_request(f"unmarked-{number}", 0)
    assert len(deliveries) == 3
    assert not marks(folder)


def test_a_mark_whose_time_is_up_is_removed_behind_one_that_is_expected_for_long(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending, "_SEARCH_SECONDS", 0)
    deliveries = PendingDeliveries(folder, lease=0)
    deliveries.record_request("long", 60)
    deliveries.record_request("short", 1e-3)
    time.sleep(0.01)
    deliveries.record_request("new", 60)
    assert marks(folder) == ["long", "new"]
    assert len(deliveries) == 2


def test_an_embedding_is_expected_for_the_longest_time_given_but_not_longer(folder: Path) -> None:
    deliveries = PendingDeliveries(folder, lease=60)
    deliveries.record_request("a", 1e-3)
    time.sleep(0.01)
    assert not is_expected(folder, "a"), "the lease does not prolong it"
    for seconds in (30, 1e300, 1, 0):
        deliveries.record_request("a", seconds)
    assert 86_000 < (folder / ".expected/a").stat().st_mtime - time.monotonic() < 86_401, (
        "a day at most, and no later call ends it"
    )
    assert deliveries.forget("a") == 5
    assert deliveries.forget("a") == 0
    assert not marks(folder)


def test_what_is_no_key_is_neither_remembered_nor_marked(folder: Path) -> None:
    deliveries = PendingDeliveries(folder, lease=60)
    for key in ("../a", ".expected", "", "a/b"):
        with pytest.raises(errors.InvalidRequest, match="not an embedding key"):
            deliveries.record_request(key, 60)
    assert len(deliveries) == 0
    assert sorted(file.name for file in folder.iterdir()) == [".expected", ".free", ".incoming", ".pinned"]

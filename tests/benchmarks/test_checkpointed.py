from pathlib import Path

import pytest

from benchmarks import result
from benchmarks.checkpointed import Kept


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(result, "FOLDER", tmp_path)
    return tmp_path


def never() -> str:
    raise AssertionError("measured again")


def test_a_run_that_was_broken_off_goes_on_where_it_was() -> None:
    kept = Kept("long", quick=False)
    assert kept.part("first", lambda: {"ours": 1.5}) == {"ours": 1.5}
    with pytest.raises(AssertionError):
        kept.part("second", never)
    again = Kept("long", quick=False)
    assert again.part("first", never) == {"ours": 1.5}
    assert again.part("second", lambda: [2, "three"]) == [2, "three"]
    assert Kept("long", quick=False).part("second", never) == [2, "three"]


def test_one_that_is_done_is_begun_anew(folder: Path) -> None:
    kept = Kept("long", quick=False)
    kept.part("first", lambda: 1)
    kept.done()
    assert list(folder.iterdir()) == []
    assert Kept("long", quick=False).part("first", lambda: 2) == 2


def test_what_was_measured_otherwise_is_not_gone_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    Kept("long", quick=False).part("first", lambda: 1)
    assert Kept("long", quick=True).part("first", lambda: 2) == 2
    assert Kept("other", quick=False).part("first", lambda: 3) == 3
    monkeypatch.setattr(result, "environment", lambda: {"commit": "another"})
    assert Kept("long", quick=False).part("first", lambda: 4) == 4

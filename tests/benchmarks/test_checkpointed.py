from pathlib import Path
from typing import Any

import pytest

from benchmarks import result
from benchmarks.checkpointed import CheckpointedRun


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(result, "FOLDER", tmp_path)
    return tmp_path


def must_not_measure() -> Any:
    raise AssertionError("measured again")


def test_an_interrupted_run_continues_after_its_last_measurement() -> None:
    run = CheckpointedRun("long", quick=False)
    assert run.measure("first", lambda: {"ours": 1.5}) == {"ours": 1.5}
    with pytest.raises(AssertionError):
        run.measure("second", must_not_measure)
    resumed = CheckpointedRun("long", quick=False)
    assert resumed.measure("first", must_not_measure) == {"ours": 1.5}
    assert resumed.measure("second", lambda: [2, "three"]) == [2, "three"]
    assert CheckpointedRun("long", quick=False).measure("second", must_not_measure) == [2, "three"]


def test_a_run_after_a_finished_one_measures_everything_again(folder: Path) -> None:
    run = CheckpointedRun("long", quick=False)
    run.measure("first", lambda: 1)
    run.finish()
    assert list(folder.iterdir()) == []
    assert CheckpointedRun("long", quick=False).measure("first", lambda: 2) == 2


def test_measurements_of_another_configuration_are_not_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    CheckpointedRun("long", quick=False).measure("first", lambda: 1)
    assert CheckpointedRun("long", quick=True).measure("first", lambda: 2) == 2
    assert CheckpointedRun("other", quick=False).measure("first", lambda: 3) == 3
    monkeypatch.setattr(result, "environment", lambda: {"commit": "another"})
    assert CheckpointedRun("long", quick=False).measure("first", lambda: 4) == 4

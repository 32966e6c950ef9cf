import json
from pathlib import Path

import pytest

from benchmarks import report, result
from benchmarks.checkpointed import CheckpointedRun


def test_an_unfinished_run_is_not_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result, "FOLDER", tmp_path)
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    finished = {"ratio": 1.234, "target": 1.1, "met": True, "spread": 0.05, "environment": {"commit": "abc"}}
    (tmp_path / "encoder.json").write_text(json.dumps(finished))
    CheckpointedRun("wire", quick=False).measure("first", lambda: 1)
    report.write()
    assert (tmp_path / "table.md").read_text().splitlines()[2:] == ["| encoder | 1.23 | 1.1 | met | 5% | abc |"]


def test_all_plots_are_drawn_from_the_committed_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in result.FOLDER.glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    report.write()
    assert {file.name for file in tmp_path.glob("*.png")} == {"ratios.png", "interference.png", "equal-hardware.png"}

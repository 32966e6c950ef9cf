import json
from pathlib import Path

import pytest

from benchmarks import report, result
from benchmarks.checkpointed import Kept


def test_a_run_that_is_not_done_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result, "FOLDER", tmp_path)
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    said = {"ratio": 1.234, "target": 1.1, "met": True, "spread": 0.05, "environment": {"commit": "abc"}}
    (tmp_path / "encoder.json").write_text(json.dumps(said))
    Kept("wire", quick=False).part("first", lambda: 1)
    report.write()
    assert (tmp_path / "table.md").read_text().splitlines()[2:] == ["| encoder | 1.23 | 1.1 | met | 5% | abc |"]

"""What is shown to who scrapes, by one process and by one of several."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
from server.metrics import Metrics
there = [("vision", "a:1", True), ("vision", "b:1", False)]
metrics = Metrics()
metrics.watch(lambda: there)
metrics.encodes.inc(3)
print(metrics.text().decode())
print("---")
there[:] = [("vision", "c:1", True)]
print(metrics.text().decode())
"""


@pytest.mark.parametrize("several", [False, True])
def test_a_worker_that_has_left_is_not_shown(tmp_path: Path, several: bool) -> None:
    variables = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)} if several else {}  # read when prometheus-client is imported
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **variables})
    before, after = done.stdout.split("---")
    assert "dvd_encodes_total 3.0" in before
    assert "dvd_encodes_total 3.0" in after
    shown = [{line for line in text.splitlines() if line.startswith("dvd_worker_up")} for text in (before, after)]
    assert shown[0] == {'dvd_worker_up{address="a:1",kind="vision"} 1.0', 'dvd_worker_up{address="b:1",kind="vision"} 0.0'}
    assert shown[1] == {'dvd_worker_up{address="c:1",kind="vision"} 1.0'}
    assert list(tmp_path.iterdir()) if several else not list(tmp_path.iterdir())

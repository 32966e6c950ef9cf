import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import serving, table
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.kit import Kit, Measurement, Skipped
from benchmarks.gpu.shapes import PUBLISHED
from benchmarks.gpu.worker import WORKLOADS
from tests.e2e.serving import ROOT

CPU = torch.device("cpu")

WITHOUT_SERVER_PACKAGES = """
import importlib.abc, runpy, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"grpc", "google", "fastapi", "vllm", "transformers", "redis", "prometheus_client", "msgspec"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""


def kit_in(folder: Path, seconds: float = 60.0, dry: bool = False) -> Kit:
    return Kit(folder, seconds, CPU, dry)


def saved(folder: Path) -> Any:
    return json.loads((folder / "gpu.json").read_text())


def test_a_dry_run_makes_every_measurement_without_the_servers_packages(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_SERVER_PACKAGES, "--dry", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    skipped = saved(tmp_path)["skipped"]
    for name in ("vision worker 300M", "3 × vision worker 300M"):
        assert skipped.pop(name) == "the package grpc is missing"
    for name in (serving.STOCK, serving.OURS, serving.FLASH):
        assert skipped.pop(f"serving 8B, {name}") == "the package vllm is missing"
    assert set(skipped.values()) == {"a CPU has no CUDA graphs"}, skipped
    names = " ".join(saved(tmp_path)["figures"])
    for part in ("300M, eager", "6B, eager", "6B, compiled", "router 6B", "64 tokens", "copies", "preprocessing", "kernels"):
        assert part in names
    assert "| tower 300M, eager, 1 tiles | tiles/s: " in done.stdout


def test_a_dry_run_measures_a_whole_vision_worker(tmp_path: Path) -> None:
    assert main(["--dry", "--only", "vision worker", "--out", str(tmp_path)]) == 0
    assert saved(tmp_path)["skipped"] == {}
    figures = saved(tmp_path)["figures"]["vision worker 300M"]
    for workload in WORKLOADS:
        assert figures[workload.name]["tiles/s"] > 0
        assert (figures[workload.name]["deliver, ms"] > 0) == workload.delivered
    assert "| vision worker 300M: one call at a time, 1920 × 1080 | tiles/s: " in (tmp_path / "gpu.md").read_text()


def test_a_text_in_no_name_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--dry", "--only", "nonsense", "--out", str(tmp_path)]) == 2
    assert "--only 'nonsense': no measurement has this text in its name" in capsys.readouterr().out


def test_results_that_cannot_be_written_are_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit, match="2"):
        main(["--dry", "--out", str(file)])
    assert f"argument --out: expected a folder for results, or a place for one, not '{file}'" in capsys.readouterr().err


def test_a_time_that_is_no_number_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--seconds=nan"])
    assert "argument --seconds: expected a number above 0, not 'nan'" in capsys.readouterr().err


@pytest.mark.vllm
def test_a_dry_run_measures_a_whole_server(tmp_path: Path) -> None:
    assert main(["--dry", "--only", f"serving 8B, {serving.FLASH}", "--out", str(tmp_path)]) == 0
    assert saved(tmp_path)["skipped"] == {}
    figures = saved(tmp_path)["figures"][f"serving 8B, {serving.FLASH}"]
    assert all(figures[workload]["requests/s"] > 0 for workload in (serving.NEW, serving.REPEATED))


@pytest.mark.parametrize(("shape", "tflop"), [(PUBLISHED[0], 0.724), (PUBLISHED[1], 11.94)])
def test_operations_of_a_tile(shape: Any, tflop: float) -> None:
    assert shape.flop_per_tile / 1e12 == pytest.approx(tflop, rel=0.02)


def test_a_second_run_measures_only_what_is_missing(tmp_path: Path) -> None:
    calls = []

    def measure(name: str) -> dict[str, Any]:
        calls.append(name)
        return {"tiles/s": 1.0}

    def measurements() -> Iterator[Measurement]:
        for name in ("first", "second"):
            yield Measurement(name, 1, functools.partial(measure, name))

    kit_in(tmp_path, seconds=0).run(measurements())
    assert saved(tmp_path)["skipped"] == dict.fromkeys(("first", "second"), "needs 1 s, 0 s are left: run again to continue")
    kit_in(tmp_path).run(iter([*measurements()][:1]))
    kit_in(tmp_path).run(measurements())
    assert calls == ["first", "second"]
    assert set(saved(tmp_path)["figures"]) == {"first", "second"}
    assert saved(tmp_path)["skipped"] == {}
    kit_in(tmp_path, dry=True).run(measurements())
    assert calls == ["first", "second"] * 2, "figures of another environment are not continued"


def test_a_measurement_that_fails_is_skipped_with_its_reason(tmp_path: Path) -> None:
    def fail(error: Exception) -> dict[str, Any]:
        raise error

    errors = {"memory": torch.OutOfMemoryError("CUDA out of memory\nmore"), "absent": Skipped("no such card")}
    kit = kit_in(tmp_path)
    kit.run(Measurement(name, 1, functools.partial(fail, error)) for name, error in errors.items())
    assert kit.skipped == {"memory": "OutOfMemoryError: CUDA out of memory", "absent": "no such card"}


def test_the_table_says_whether_a_target_is_met(tmp_path: Path) -> None:
    kit = kit_in(tmp_path)
    kit.figures = {
        "tower 300M, eager, 8 tiles": {"tiles/s": 500.0, "share of the reachable": 0.46},
        "tower 6B, eager, 8 tiles": {"tiles/s": 30.0, "share of the reachable": 0.45},
        "preprocessing": {"cores": 2, "tiles/s, a thread per core": 200.0, "tiles/s, a process per core": 250.0},
    }
    kit.save()
    lines = table.write(kit, PUBLISHED).read_text()
    assert "300M: 46% of the TFLOP/s that the device can reach, target 45%, met" in lines
    assert "6B: 45% of the TFLOP/s that the device can reach, target 60%, missed" in lines
    assert "The 300M tower at 500 tiles/s needs 4.0 cores" in lines


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path / "none")]) == 1
    assert "--dry" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()

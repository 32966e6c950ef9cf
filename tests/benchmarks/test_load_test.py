import asyncio
import json
from pathlib import Path

import pytest

from benchmarks import load_test
from tests.benchmarks.fake_server import FakeServer


@pytest.fixture(autouse=True)
def fast_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_test, "_WARM_UP_RATE", 50.0)  # for half a second


async def run(server: FakeServer, out: Path) -> int:
    async with server.running() as url:
        arguments = [f"--url={url}", "--rates", "20", "--seconds=0.5", "--size=64x64", "--key=secret", f"--out={out}"]
        return await asyncio.to_thread(load_test.main, arguments)


async def test_a_load_test_writes_table_figures_and_plot(tmp_path: Path) -> None:
    assert await run(FakeServer(), tmp_path) == 0
    table = (tmp_path / "load.md").read_text().splitlines()
    assert [line.split(" | ")[:2] for line in table[2:]] == [["| unique", "20.00"], ["| repeated", "20.00"]]
    content = json.loads((tmp_path / "load.json").read_text())
    assert content["options"]["model"] == "fake-model"
    assert content["options"]["key"] is True
    assert [point["failed"] for point in content["points"]] == [0, 0]
    assert (tmp_path / "load.png").stat().st_size > 0


async def test_a_load_test_with_a_failed_request_ends_with_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert await run(FakeServer(fails_at=30), tmp_path) == 1  # after the 25 of the warm-up
    assert "request failed: 503: no worker is available" in capsys.readouterr().err


def test_a_load_test_without_a_server_ends_with_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert load_test.main(["--url", "http://127.0.0.1:9"]) == 1
    assert "cannot read the models of http://127.0.0.1:9" in capsys.readouterr().err


async def test_a_folder_that_cannot_be_made_is_named_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    server = FakeServer(fails_at=0)
    assert await run(server, tmp_path / "file" / "results") == 1
    assert f"--out {tmp_path}/file/results: expected a folder for the results" in capsys.readouterr().err

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
    with pytest.raises(SystemExit, match="2"):
        await run(server, tmp_path / "file" / "results")
    assert f"argument --out: expected a folder for results, or a place for one, not '{tmp_path}/file/results'" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("text", ["", "896", "0x5", "896x", "-1x5", "1e3x5", "100000x5"])
def test_a_wrong_size_is_a_usage_error(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        load_test.main([f"--size={text}"])
    assert f"argument --size: expected WIDTHxHEIGHT in pixels, as in 896x448, not {text!r}" in capsys.readouterr().err


def test_a_size_has_width_and_height() -> None:
    assert load_test._image_size("896X448") == (896, 448)


@pytest.mark.parametrize(("option", "value"), [("--rates", "-1"), ("--tokens", "0")])
def test_a_number_that_is_not_above_0_is_a_usage_error(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        load_test.main([option, value])
    assert f"argument {option}: expected" in capsys.readouterr().err

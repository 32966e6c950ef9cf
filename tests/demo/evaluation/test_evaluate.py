"""The whole command, against a fake gateway."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from demo import evaluate
from demo.evaluation import client
from demo.evaluation.plan import ROUTER_MODES, plan_router
from demo.text.questions import TASKS
from tests.demo.evaluation.fake_gateway import FakeGateway


def arguments(gateway: FakeGateway, folder: Path, *more: str) -> list[str]:
    sizes = ["--n", "2", "--talk", "3", "--pictures", "1"]
    return ["--url", gateway.url + "/", "--out", str(folder / "out"), "--images", str(folder / "images"), *sizes, *more]


def test_results_and_plots_are_written(gateway: FakeGateway, tmp_path: Path, capfd: Any) -> None:
    assert evaluate.main(arguments(gateway, tmp_path)) == 0
    results = {name: json.loads((tmp_path / f"out/{name}.json").read_text()) for name in ("accuracy", "router", "curve")}
    for result in results.values():
        assert result["server"] == {"model": "tiny", "version": "9.9", "engine": "8.8"}
        assert len(result["date"]) == 10
    for name, style in results["accuracy"]["styles"].items():
        assert list(style) == ["all", *TASKS], name
        assert all(style[task]["n"] == 2 for task in TASKS)
        assert style["number"]["correct"] == 0
        assert style["all"]["correct"] == style["presence"]["correct"] + style["same"]["correct"]
    assert results["accuracy"]["text"]["all"]["n"] == 3
    assert [setting["setting"] for setting in results["router"]["settings"]] == ["off", "auto", "all"]
    assert results["curve"]["settings"][:3] == results["router"]["settings"]
    shares = [setting["token_share"] for setting in results["curve"]["settings"][3:9]]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]
    assert {file.name for file in (tmp_path / "images").iterdir()} == {"accuracy.png", "curve.png"}
    output = capfd.readouterr()
    assert "| number | 0.0 (0.0–65.8) |" in output.out
    assert "| off | 100.0 |" in output.out
    assert "curve" in output.err
    requests = len(gateway.bodies)
    assert evaluate.main(arguments(gateway, tmp_path)) == 0
    assert len(gateway.bodies) == requests, "the second run uses the stored answers"


def test_parts_can_be_chosen(gateway: FakeGateway, tmp_path: Path) -> None:
    assert evaluate.main(arguments(gateway, tmp_path, "--parts", "router")) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"answers.jsonl", "router.json"}
    assert {body["vir"]["mode"] for body in gateway.bodies} == {"off", "auto", "all"}


def test_images_are_cut_into_fewer_tiles(gateway: FakeGateway, tmp_path: Path) -> None:
    assert evaluate.main(arguments(gateway, tmp_path, "--parts", "tiles")) == 0
    budgets = [part["image_url"]["max_dynamic_patch"] for body in gateway.bodies for part in body["messages"][0]["content"][:1]]
    assert set(budgets) == {12, 6, 4}
    results = json.loads((tmp_path / "out/tiles.json").read_text())
    assert [setting["max_tiles"] for setting in results["settings"]] == [12, 6, 4]


def test_an_interrupted_run_keeps_its_answers_and_resumes(gateway: FakeGateway, tmp_path: Path, capfd: Any) -> None:
    def interrupt() -> None:
        if len(gateway.bodies) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    gateway.before_answer = interrupt
    command = arguments(gateway, tmp_path, "--parts", "router", "--in-flight", "1")
    try:
        assert evaluate.main(command) == 130
    except KeyboardInterrupt:  # would end pytest
        pytest.fail("The interrupt was not handled.")
    assert "resume" in capfd.readouterr().err
    stored = (tmp_path / "out/answers.jsonl").read_text().splitlines()
    assert 4 <= len(stored) <= 5
    assert not (tmp_path / "out/router.json").exists()
    gateway.before_answer = lambda: None
    gateway.bodies.clear()
    assert evaluate.main(command) == 0
    total = sum(len(group.requests) for group in plan_router(1, ROUTER_MODES))
    assert len(gateway.bodies) == total - len(stored)


def test_an_unreachable_server_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(client, "RETRY_DELAYS_SECONDS", ())
    assert evaluate.main(["--url", "http://127.0.0.1:9", "--out", str(tmp_path)]) == 1
    assert "http://127.0.0.1:9/v1/models" in capfd.readouterr().err


@pytest.mark.parametrize(
    "options", [["--n", "0"], ["--n", "-3"], ["--in-flight", "x"], ["--parts", "none"], ["--pictures", "²"]]
)
def test_invalid_options_are_rejected(options: list[str], capfd: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(options)
    assert options[0] in capfd.readouterr().err

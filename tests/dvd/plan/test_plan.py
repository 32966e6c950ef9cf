"""`dvd plan`: the search for a fleet, its report, and its errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dvd.plan.command import main
from dvd.plan.model import Costs, Fleet, Kind, LanguageCosts, Limits, Load, VisionCosts
from dvd.plan.search import Infeasible, cheapest, meets_limits, simulate_saturated

COSTS = Costs(
    vision=VisionCosts(prepare=0.004, cores=8, batch=0.002, tile=0.01, batch_tiles=16),
    language=LanguageCosts(step=0.005, prefill=0.00002, decode=0.0001),
    bytes_per_token=4096,
)
LOAD = Load(rate=20, kinds=[Kind(tiles=7, output=20)], limits=Limits(ttft=1.0, itl=0.3))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({"costs": COSTS.model_dump(), "load": LOAD.model_dump()}))
    return path


def test_the_cheapest_fleet_meets_the_limits_and_no_smaller_one_does() -> None:
    plan = cheapest(COSTS, LOAD)
    assert meets_limits(COSTS, LOAD, plan.fleet)
    for name in ("vision", "language"):
        if (count := getattr(plan.fleet, name)) > 1:
            assert not meets_limits(COSTS, LOAD, plan.fleet.model_copy(update={name: count - 1})), name
    assert plan.saturated.throughput > LOAD.rate


def test_more_load_needs_more_workers_and_compression_needs_fewer() -> None:
    heavy = LanguageCosts(step=0.005, prefill=0.0001, decode=0.0001)
    costs = COSTS.model_copy(update={"language": heavy})
    fleets = [cheapest(costs, LOAD.model_copy(update=change)).fleet for change in ({"rate": 5}, {}, {"compressed": 0.7})]
    assert fleets[0].vision < fleets[1].vision
    assert fleets[0].language < fleets[1].language
    assert fleets[2].language < fleets[1].language


@pytest.mark.parametrize(("limits", "word"), [(Limits(ttft=0.01), "TTFT"), (Limits(itl=0.001), "ITL")])
def test_limits_below_a_single_request_are_infeasible(limits: Limits, word: str) -> None:
    with pytest.raises(Infeasible, match=word):
        cheapest(COSTS, LOAD.model_copy(update={"limits": limits}))


def test_throughput_grows_with_vision_workers_until_language_is_the_bottleneck() -> None:
    rates = [simulate_saturated(COSTS, LOAD, Fleet(vision=count, language=1)).throughput for count in (1, 2, 4, 8)]
    assert rates[1] > 1.6 * rates[0], rates
    assert rates[3] == pytest.approx(rates[2], rel=0.05), rates


def test_the_report_as_text(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(file)]) == 0
    report = capsys.readouterr().out
    assert "workers          2 vision and 1 language workers" in report
    for word in ("TTFT", "ITL", "saturated", "bottleneck", "Gb/s"):
        assert word in report


def run(file: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert main([str(file), "--json", *options]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_options_override_the_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(file, capsys)["vision_workers"] == 2
    assert run(file, capsys, "--rate", "40")["vision_workers"] > 2
    fixed = run(file, capsys, "--vision-workers", "3", "--language-workers", "2")
    assert (fixed["vision_workers"], fixed["language_workers"]) == (3, 2)
    small = run(file, capsys, "--compressed", "1", "--vision-workers", "2")
    assert small["work"]["language"] < fixed["work"]["language"]


def test_a_plot(file: Path, tmp_path: Path) -> None:
    assert main([str(file), "--plot", str(tmp_path / "plan.png")]) == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("", "keys costs and load"),
        ("[1, 2]", "keys costs and load"),
        ("cost: {}", "keys costs and load"),
        ("costs: {}", "vision: field required"),
        ("{costs: {vision: {prepare: 1, tile: -2}, language: {prefill: 1}, bytes_per_token: 2}}", "vision.tile"),
        ("{costs: {vision: {prepare: 1, tile: 2, tiles: 3}, language: {prefill: 1}, bytes_per_token: 2}}", "vision.tiles"),
        ("a: [", "expected"),
    ],
)
def test_an_invalid_file_is_an_error_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, word: str
) -> None:
    (tmp_path / "bad.yaml").write_text(content)
    assert main([str(tmp_path / "bad.yaml")]) == 2
    error = capsys.readouterr().err
    assert word in error
    assert error.count("\n") == 1


def test_a_missing_file_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_infeasible_limits_exit_with_1(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(file), "--ttft", "0.01"]) == 1
    assert "a request alone has a TTFT of" in capsys.readouterr().err

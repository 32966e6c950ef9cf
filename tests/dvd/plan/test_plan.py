"""`dvd plan`: the search for a fleet, its report, and its errors."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import result
from dvd.plan.command import main
from dvd.plan.model import Costs, Fleet, Kind, LanguageCosts, Limits, Load, VisionCosts
from dvd.plan.search import Infeasible, advise, cheapest, meets_limits, simulate_saturated
from dvd.plan.simulation import percentile

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
        ("cost: {}", "cost: unknown key"),
        ("{costs: {vision: {prepare: 1, tile: -2}, language: {prefill: 1}, bytes_per_token: 2}}", "costs.vision.tile = -2"),
        ("a: [", "line 1, column 5"),
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "one of the arguments FILE --example --from is required"),
        (["FILE", "--example"], "not allowed with argument"),
        (["FILE", "--from", "http://a"], "not allowed with argument"),
        (["FILE", "--vision-workers=0"], "expected a whole number above 0, not '0'"),
        (["FILE", "--language-workers=two"], "expected a whole number above 0, not 'two'"),
        (["FILE", "--language-workers=4097"], "expected at most 4096 workers, not '4097'"),
        (["FILE", "--vision-price=-1"], "expected a number above 0, not '-1'"),
        (["FILE", "--vision-price=nan"], "expected a number above 0, not 'nan'"),
        (["FILE", "--rats=1"], "unrecognized arguments: --rats=1"),
    ],
)
def test_an_invalid_option_is_one_line(
    file: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(file) if option == "FILE" else option for option in options])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("option", "message"), [("--rate=-1", "load.rate = -1.0"), ("--ttft=nan", "load.limits.ttft = nan")])
def test_an_option_out_of_range_is_named_like_its_key(
    file: Path, capsys: pytest.CaptureFixture[str], option: str, message: str
) -> None:
    assert main([str(file), option]) == 2
    assert message in capsys.readouterr().err


def test_the_example_can_be_piped_back(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["--example"]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO(capsys.readouterr().out))
    assert main(["-"]) == 0
    assert capsys.readouterr().out.startswith("answer           ")
    monkeypatch.setattr("sys.stdin", io.StringIO("a: ["))
    assert main(["-"]) == 2
    assert capsys.readouterr().err.startswith("dvd plan: standard input: line 1, column 5: ")


def test_a_load_without_images_needs_no_decoupling(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    advice = advise(COSTS, TEXT, cheapest(COSTS, TEXT))
    assert not advice.decouple
    assert advice.reason == "1 colocated vLLM server at a price of 1 is enough; decoupled workers cost 2"


TEXT = Load(rate=2, kinds=[Kind(images=0, output=20)])


def test_images_that_delay_streams_need_decoupling() -> None:
    """A colocated server encodes seven tiles between two tokens: 100 ms and more."""
    load = LOAD.model_copy(update={"limits": Limits(ttft=1.0, itl=0.06)})
    plan = cheapest(COSTS, load)
    assert percentile(plan.outcome.itl, 0.99) <= 0.06
    advice = advise(COSTS, load, plan)
    assert advice.decouple
    assert advice.colocated is None
    assert "miss a limit: ITL p99" in advice.reason
    assert advice.reason.endswith("limit 60 ms")


def test_at_the_same_price_throughput_decides() -> None:
    """Each request takes 100 ms of vision and little of language: decoupled, one of two workers is mostly idle."""
    load = Load(rate=4, kinds=[Kind(tiles=10, output=2)], limits=Limits(ttft=30, itl=30))
    plan = cheapest(COSTS, load)
    assert plan.fleet == Fleet(vision=1, language=1)
    slow = COSTS.model_copy(update={"vision": COSTS.vision.model_copy(update={"prepare": 0.00001})})
    advice = advise(slow, load, cheapest(slow, load))
    assert not advice.decouple
    # one thread of a colocated server prepares ten tiles in 0.4 s, a vision worker has eight
    blocked = COSTS.model_copy(update={"vision": COSTS.vision.model_copy(update={"prepare": 0.04})})
    assert advise(blocked, load, cheapest(blocked, load)).decouple


@pytest.mark.parametrize("rate", [1.0, 4.0, 8.0])
def test_traffic_with_few_images_is_not_worth_decoupling(rate: float) -> None:
    """One request in five has an image of three tiles; the costs are those that the benchmarks measured on two cores."""
    costs = Costs.model_validate(yaml.safe_load(MEASURED.read_text())["costs"])
    kinds = [Kind(weight=1, tiles=3, output=85), Kind(weight=4, images=0, output=85)]
    load = Load(rate=rate, kinds=kinds, limits=Limits(ttft=30, itl=5))
    assert not advise(costs, load, cheapest(costs, load)).decouple


MEASURED = Path(result.__file__).parent / "results/costs.yaml"


def test_a_cheaper_vision_worker_can_make_decoupling_pay() -> None:
    load = LOAD.model_copy(update={"limits": Limits(ttft=5.0, itl=5.0)})
    assert not advise(COSTS, load, cheapest(COSTS, load), 1.0).decouple
    assert advise(COSTS, load, cheapest(COSTS, load, 0.1), 0.1).decouple


def test_the_answer_as_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = run(file, capsys)
    assert (plan["decouple"], plan["reason"]) == (advise(COSTS, LOAD, cheapest(COSTS, LOAD)).decouple, plan["reason"])
    assert "decouple" not in run(file, capsys, "--vision-workers=1")


def test_a_missing_file_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_infeasible_limits_exit_with_1(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(file), "--ttft", "0.01"]) == 1
    assert "a request alone has a TTFT of" in capsys.readouterr().err

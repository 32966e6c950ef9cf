"""The soak's accounting: what counts as a fault of the server, and how growth is measured."""

import time
from pathlib import Path

import pytest

from benchmarks.soak import plot
from benchmarks.soak.__main__ import after_faults
from benchmarks.soak.requests import FAULTS, OUTCOMES, Outcome, classify, questions
from benchmarks.soak.resources import Sample, growth

ERROR = '{"error": {"message": "m", "type": "t", "param": null, "code": "unavailable"}}'


@pytest.mark.parametrize(
    ("status", "text", "outcome"),
    [
        (429, ERROR, "refused"), (503, ERROR, "refused"), (504, ERROR, "late"), (500, ERROR, "failed"), (400, ERROR, "failed"),
        (503, "Internal Server Error", "failed"), (429, "", "failed"), (503, "[]", "failed"), (503, '{"error": 1}', "failed"),
    ],
)  # fmt: skip
def test_only_refusals_with_an_error_object_are_no_faults(status: int, text: str, outcome: str) -> None:
    name, detail = classify(status, text)
    assert name == outcome
    assert str(status) in detail
    assert (name in FAULTS) == (name == "failed")


def test_questions_have_official_answers() -> None:
    assert len(questions()) >= 5
    assert all(len(ids) == 16 for _, ids in questions())


def samples(name: str, start: int, memory: list[float]) -> list[Sample]:
    return [Sample(float(i), name, start, size, 10 + i, 3) for i, size in enumerate(memory)]


def test_growth_is_that_of_the_longest_run_after_its_warm_up() -> None:
    rising = samples("gateway", 2, [10, 90, 100, 100, 100, 100, 100, 110, 130, 150, 170, 190])
    short = samples("gateway", 1, [10, 1000])
    assert growth([*short, *rising], "gateway")["memory_mib"] == 90
    flat = samples("gateway", 1, [10, 90, *[100] * 10])
    assert growth(flat, "gateway")["memory_mib"] == 0


def test_a_process_that_ran_for_moments_has_no_growth() -> None:
    assert growth(samples("vision", 1, [10, 20, 30]), "vision") == {}
    assert growth([], "vision") == {}


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    now = time.monotonic()
    outcomes = [Outcome(name, now + i, 0.5) for i, name in enumerate(OUTCOMES)]
    plot.draw(
        outcomes, [("kill vision-0", now + 3)], samples("gateway", 1, [1, 2, 3]), [(now, 5.0)], now, tmp_path / "soak.png"
    )
    assert (tmp_path / "soak.png").stat().st_size > 10_000


def test_what_follows_a_fault_is_counted_until_the_next_one() -> None:
    outcomes = [Outcome("right", float(at), 0.5) for at in range(60)]
    outcomes += [Outcome("right", 22.5, 4.0), Outcome("refused", 23.5, 0.1), Outcome("broken", 31.0, 0.1)]
    after = after_faults(outcomes, [("kill vision-0", 10.0), ("kill vision-1", 20.0), ("freeze redis", 30.0)])
    assert after["kill vision"] == {"times": 2, "longest": 4.0, "refused": 1, "lost": 0}
    assert after["freeze redis"] == {"times": 1, "longest": 0.5, "refused": 0, "lost": 1}

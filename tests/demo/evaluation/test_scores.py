import io
import time

import pytest

from demo.evaluation.answers import AnswerRecord
from demo.evaluation.progress import Progress, format_seconds
from demo.evaluation.scores import format_score, markdown_table, score, score_by_task, token_usage, wilson_interval


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605), (450, 500, 0.8706, 0.9233), (0, 0, 0.0, 1.0), (1, 1, 0.2065, 1.0),
    ],
)  # fmt: skip
def test_wilson_interval(correct: int, n: int, low: float, high: float) -> None:
    """Some values are the examples of Newcombe (1998)."""
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=6e-5)


def record(index: int, task: str, answer: str, tokens: int = 0) -> AnswerRecord:
    return AnswerRecord(f"{index}/{task}", "m", "router", index, "auto", task, "q", "yes", answer, tokens, 1000)


def test_tokens_of_an_image_count_once() -> None:
    records = [record(0, task, "yes", 1000) for task in ("colour", "count", "number")] + [record(1, "count", "no", 250)]
    assert token_usage(records) == {"images": 2, "tokens": 1250, "uncompressed_tokens": 2000, "token_share": 0.625}
    scores = score_by_task(records)
    assert [(task, value["correct"], value["n"]) for task, value in scores.items()] == [
        ("all", 3, 4), ("colour", 1, 1), ("count", 1, 2), ("number", 1, 1),
    ]  # fmt: skip


def test_markdown_table() -> None:
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"
    assert format_score(score([record(0, "x", "yes"), record(1, "x", "no")])) == "50.0 (9.4–90.5)"
    assert format_score(None) == format_score(score([])) == "–"


def test_progress_estimates_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 110.0, 120.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    progress = Progress("part", 8, [record(0, "x", "yes"), record(1, "x", "no")], stream)
    progress.step(True)
    progress.step(True)
    assert stream.getvalue() == "part 3/8  50 s left  66.7% correct\n"
    assert [format_seconds(seconds) for seconds in (5, 99, 600)] == ["5 s", "99 s", "10 min"]

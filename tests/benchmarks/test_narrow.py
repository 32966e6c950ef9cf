"""The comparison of answers in the benchmark of narrow embeddings."""

import math

import pytest

from benchmarks.narrow_answers import Answer, divergences

EVEN = {"a": math.log(0.5), "b": math.log(0.5)}
SKEWED = {"a": math.log(0.9), "b": math.log(0.1)}
DIVERGENCE = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)


def answer(tokens: list[int], *distributions: dict[str, float]) -> Answer:
    return Answer(tokens, "", list(distributions))


def test_equal_answers_do_not_diverge() -> None:
    assert divergences(answer([1, 2], EVEN, SKEWED), answer([1, 2], EVEN, SKEWED)) == [0.0, 0.0]


def test_the_divergence_is_that_of_the_whole_distributions() -> None:
    assert divergences(answer([1], EVEN), answer([1], SKEWED)) == [pytest.approx(DIVERGENCE)]


def test_positions_after_the_first_other_token_are_not_compared() -> None:
    exact, other = answer([1, 2, 3], EVEN, EVEN, EVEN), answer([1, 5, 3], EVEN, SKEWED, EVEN)
    assert divergences(exact, other) == [0.0, pytest.approx(DIVERGENCE)]


def test_tokens_that_only_one_side_lists_count_as_one() -> None:
    """A lower bound of the divergence of the whole distributions."""
    p = {"a": math.log(0.6), "b": math.log(0.3)}
    q = {"a": math.log(0.5), "c": math.log(0.3)}
    (value,) = divergences(answer([1], p), answer([1], q))
    assert value == pytest.approx(0.6 * math.log(0.6 / 0.5) + 0.4 * math.log(0.4 / 0.5))
    assert value > 0

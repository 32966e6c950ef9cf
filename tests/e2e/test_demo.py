"""The bundled checkpoint answers truly through the whole path; how truly is measured by `python -m demo.evaluate`."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from demo import scenes
from demo.scenes import Style
from demo.words import ABILITIES, GREETING, UNKNOWN, Asked, questions
from tests.e2e.serving import Answer, Served, image_part, up

DEMO = Path(__file__).parents[2] / "demo/checkpoint"
SEED = 1_234_567_890


@pytest.fixture(scope="module")
def demo() -> Iterator[Served]:
    with up(DEMO) as served:
        yield served


def said(answer: Answer) -> str:
    return str(answer.json["choices"][0]["message"]["content"]).strip()


def pictures() -> list[tuple[bytes, list[Asked]]]:
    """One picture for each number of tiles, drawn from seeds that training never uses."""
    found = []
    for tiles in scenes.TILES:
        rng = np.random.default_rng([SEED, tiles])
        scene = scenes.scene(rng, Style(), tiles)
        found.append((scenes.encoded(scenes.draw(scene), rng), questions(scene, rng)))
    return found


def test_true_answers(demo: Served) -> None:
    asked = [(image, one) for image, questions in pictures() for one in questions]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda one: said(demo.chat(image_part(one[0]), one[1].question)), asked))
    wrong = [
        (one.question, one.answer, answer) for (_, one), answer in zip(asked, answers, strict=True) if answer != one.answer
    ]
    assert len(asked) >= 36
    assert len(wrong) <= 0.1 * len(asked), wrong


def test_the_router_saves_tokens(demo: Served) -> None:
    image = pictures()[-1][0]
    counts = {
        mode: demo.chat(image_part(image), "How many stars are there?", vir={"mode": mode}).json["usage"]["prompt_tokens"]
        for mode in ("off", "auto", "all")
    }
    assert counts["off"] - counts["all"] == 13 * (256 - 64)
    assert counts["all"] <= counts["auto"] < counts["off"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Hello", GREETING), ("What can you do?", ABILITIES), ("What is the capital of France?", UNKNOWN)],
)
def test_small_talk(demo: Served, text: str, expected: str) -> None:
    assert said(demo.chat(text, max_tokens=40)) == expected

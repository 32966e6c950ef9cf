"""The bundled checkpoint answers correctly through the whole server. `python -m demo.evaluate` measures how often."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from demo.scenes.drawing import draw_scene, encode_image
from demo.scenes.generation import generate_scene
from demo.scenes.style import TILE_COUNTS, Style
from demo.text.questions import Question, scene_questions
from demo.text.small_talk import ABILITIES_ANSWER, GREETING_ANSWER, UNKNOWN_ANSWER
from tests.e2e.serving import Answer, Served, image_part

SEED = 1_234_567_890


def answer_text(answer: Answer) -> str:
    return str(answer.json["choices"][0]["message"]["content"]).strip()


def images_with_questions() -> list[tuple[bytes, list[Question]]]:
    """One image of every other tile count, from seeds that training never uses."""
    images = []
    for tile_count in TILE_COUNTS[::2]:
        rng = np.random.default_rng([SEED, tile_count])
        scene = generate_scene(rng, Style(), tile_count)
        images.append((encode_image(draw_scene(scene), rng), scene_questions(scene, rng)))
    return images


def test_nine_of_ten_answers_are_correct(demo: Served) -> None:
    pairs = [(image, question) for image, questions in images_with_questions() for question in questions]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda pair: answer_text(demo.chat(image_part(pair[0]), pair[1].text)), pairs))
    wrong = [
        (question.text, question.answer, answer)
        for (_, question), answer in zip(pairs, answers, strict=True)
        if answer != question.answer
    ]
    assert len(pairs) >= 20
    assert len(wrong) <= 0.1 * len(pairs), wrong


def test_the_router_saves_tokens(demo: Served) -> None:
    image = images_with_questions()[2][0]
    tokens = {
        mode: demo.chat(image_part(image), "How many stars are there?", vir={"mode": mode}).json["usage"]["prompt_tokens"]
        for mode in ("off", "auto", "all")
    }
    assert tokens["off"] - tokens["all"] == 7 * (256 - 64), "six tiles and the thumbnail"
    assert tokens["all"] <= tokens["auto"] < tokens["off"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello", GREETING_ANSWER),
        ("What can you do?", ABILITIES_ANSWER),
        ("What is the capital of France?", UNKNOWN_ANSWER),
    ],
)
def test_small_talk(demo: Served, text: str, expected: str) -> None:
    assert answer_text(demo.chat(text, max_tokens=40)) == expected

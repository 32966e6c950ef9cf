"""The bundled checkpoint answers correctly through the whole server. `python -m demo.evaluate` measures how often."""

import io
import json
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageDraw

from demo.scenes.drawing import draw_scene, encode_image
from demo.scenes.generation import generate_scene
from demo.scenes.style import TILE_COUNTS, Style
from demo.text.questions import Question, scene_questions
from demo.text.small_talk import ABILITIES_ANSWER, DESCRIPTION_ANSWER, GREETING_ANSWER, UNKNOWN_ANSWER
from tests.e2e.serving import ROOT, Answer, Served, image_part, text_part

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


@pytest.mark.parametrize("question", ["Describe the image.", "Describe this image in detail.", "What do you see?"])
def test_an_open_question_has_a_fixed_answer(demo: Served, question: str) -> None:
    first, second = (image for image, _ in images_with_questions()[:2])
    for images in ([first], [second], [first, second]):
        assert answer_text(demo.chat(*map(image_part, images), question, max_tokens=40)) == DESCRIPTION_ANSWER


def test_answers_are_greedy_unless_a_request_sets_a_temperature(demo: Served) -> None:
    """vLLM rejects several greedy answers, which would all be the same."""
    messages = [{"role": "user", "content": "Hello"}]
    by_default = demo.post("/v1/chat/completions", {"messages": messages, "n": 2})
    sampled = demo.post("/v1/chat/completions", {"messages": messages, "n": 2, "temperature": 0.5})
    assert (by_default.status, sampled.status) == (400, 200)
    assert "greedy" in by_default.error["message"]


_CENTRES = ((0.5, 0.25), (0.25, 0.7), (0.75, 0.7))


def circles(size: tuple[int, int], count: int) -> bytes:
    """Up to three red circles on white, not in a row, as a drawing library draws them."""
    image = Image.new("RGB", size, "white")
    radius = 0.09 * min(size)
    for x_share, y_share in _CENTRES[:count]:
        x, y = x_share * size[0], y_share * size[1]
        ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill="red")
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("size", [(300, 200), (300, 300), (448, 448), (600, 400), (640, 480)])
def test_three_circles_are_three(demo: Served, size: tuple[int, int]) -> None:
    assert answer_text(demo.chat(image_part(circles(size, 3)), "How many circles are there?")) == "3"


@pytest.mark.parametrize("question_first", [False, True])
def test_a_question_may_precede_its_image(demo: Served, question_first: bool) -> None:
    parts = [image_part(circles((448, 448), 1)), text_part("What shape is the red object?")]
    assert answer_text(demo.chat(*(reversed(parts) if question_first else parts))) == "circle"


def test_parts_keep_their_order_in_the_prompt(demo: Served) -> None:
    image = image_part(circles((448, 448), 1))
    content = [text_part("alpha "), image, text_part("beta "), image, text_part("gamma?")]
    body = {"messages": [{"role": "user", "content": content}], "return_token_strs": True}
    tokens = demo.post("/tokenize", body).json["token_strs"]
    prompt = re.sub(r"(<IMG_CONTEXT>)+", "*", "".join(tokens)).replace("Ġ", " ").replace("Ċ", "\n")
    assert "alpha <img>*</img>\nbeta <img>*</img>\ngamma?<|im_end|>" in prompt


SCHEMA = {
    "type": "object", "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "y"]}}, "required": ["a", "b"],
    "additionalProperties": False,
}  # fmt: skip


def test_structured_output_is_compact_json(demo: Served) -> None:
    response_format = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    answer = answer_text(
        demo.chat(image_part(circles((448, 448), 1)), "What do you see?", response_format=response_format, max_tokens=64)
    )
    assert answer == json.dumps(json.loads(answer), separators=(",", ":"))
    assert set(json.loads(answer)) == {"a", "b"}


def test_a_json_object_is_no_white_space(demo: Served) -> None:
    answer = demo.chat(image_part(circles((448, 448), 1)), "What do you see?", response_format={"type": "json_object"})
    text = answer.json["choices"][0]["message"]["content"]
    assert text.startswith("{")
    assert not re.search(r"\s\s", text)


def documented_examples() -> list[tuple[str, str]]:
    """Questions about the example image and their answers, from the table in demo/README.md."""
    section = (ROOT / "demo/README.md").read_text().split("## Questions it understands")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    return [(question, answer) for _, question, answer, _ in rows[2:]]


@pytest.mark.parametrize(("question", "answer"), documented_examples())
def test_the_documented_examples_are_true(demo: Served, question: str, answer: str) -> None:
    image = image_part((ROOT / "docs/images/shapes.png").read_bytes())
    images = [image] * (2 if "two images" in question else 1)
    assert answer_text(demo.chat(*images, question, max_tokens=40)) == answer

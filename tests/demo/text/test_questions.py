import re
from collections import Counter

import numpy as np
import pytest

from demo.scenes.generation import generate_scene
from demo.scenes.scene import SHAPES, Scene, Shape, relative_centre
from demo.scenes.style import Style
from demo.text.questions import (
    Question,
    absence_questions,
    comparison_question,
    scene_questions,
    vary_spelling,
)
from demo.text.small_talk import missing_image_question, small_talk_question

ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
Samples = list[tuple[Scene, list[Question]]]


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng([11, *seed])


@pytest.fixture(scope="module")
def samples() -> Samples:
    """Scenes with their questions."""
    pairs = []
    for i in range(500):
        scene = generate_scene(rng(i), Style())
        pairs.append((scene, scene_questions(scene, rng(i, 1))))
    return pairs


def expected_answer(scene: Scene, question: str) -> str:
    """The answer, derived independently of the module. Raises where it is ambiguous."""
    if question == "What number is written?":
        assert scene.number
        return scene.number.text
    if name := re.fullmatch(r"How many (\w+) are there\?", question):
        singular = next(s for s in SHAPES if name[1] in (f"{s}s", f"{s}es"))
        return str(Counter(s.name for s in scene.shapes)[singular])
    if presence := re.fullmatch(r"Is there an? (\w+) (\w+)\?", question):
        assert ("Is there an " in question) == presence[1].startswith("o")
        return "yes" if any((s.colour, s.name) == (presence[1], presence[2]) for s in scene.shapes) else "no"
    if colour := re.fullmatch(r"What shape is the (\w+) object\?", question):
        (shape,) = (s for s in scene.shapes if s.colour == colour[1])
        return shape.name
    name = re.fullmatch(r"(?:What colour|Where) is the (\w+)\?", question)
    assert name, question
    (shape,) = (s for s in scene.shapes if s.name == name[1])
    return shape.colour if "colour" in question else position(scene, shape)


def position(scene: Scene, shape: Shape) -> str:
    x, y = (shape.box[0] + shape.box[2]) * 3 // (2 * scene.width), (shape.box[1] + shape.box[3]) * 3 // (2 * scene.height)
    return f"{ROWS[int(y)]} {COLUMNS[int(x)]}".strip() or "center"


def test_answers_agree_with_the_scene(samples: Samples) -> None:
    for scene, questions in samples:
        for question in questions:
            assert question.answer == expected_answer(scene, question.text), (question, scene)


def test_each_task_occurs_once_per_scene_that_allows_it(samples: Samples) -> None:
    totals = Counter(question.task for _, questions in samples for question in questions)
    assert set(totals) == {"colour", "shape", "count", "place", "presence", "number"}
    assert min(totals.values()) > 100
    for scene, questions in samples:
        tasks = Counter(question.task for question in questions)
        assert max(tasks.values()) == 1
        assert {"count", "presence"} <= set(tasks)
        assert ("number" in tasks) == (scene.number is not None)
        assert ("colour" in tasks) == (1 in Counter(s.name for s in scene.shapes).values())
        assert ("shape" in tasks) == (1 in Counter(s.colour for s in scene.shapes).values())


def test_no_constant_answer_is_often_correct(samples: Samples) -> None:
    limits = {"presence": 0.62, "colour": 0.3, "shape": 0.3, "place": 0.3, "count": 0.5, "number": 0.05}
    for task, limit in limits.items():
        answers = Counter(question.answer for _, questions in samples for question in questions if question.task == task)
        assert max(answers.values()) / answers.total() < limit, answers.most_common(3)


def test_there_are_no_questions_about_ambiguous_positions(samples: Samples) -> None:
    for scene, questions in samples:
        for question in questions:
            if question.task == "place":
                (shape,) = (s for s in scene.shapes if s.name in question.text)
                for share in relative_centre(scene, shape.box):
                    assert min(abs(share - 1 / 3), abs(share - 2 / 3)) > 0.04


def test_absence_questions_name_absent_objects(samples: Samples) -> None:
    checked = 0
    for i, (scene, _) in enumerate(samples[:100]):
        for question in absence_questions(scene, rng(i)):
            assert question.task == "other"
            name = question.answer.removeprefix("There is no ").removesuffix(".")
            assert scene.number is None if name == "number" else name not in {s.name for s in scene.shapes}
            assert name in question.text
            checked += 1
    assert checked > 50


def test_equal_seeds_give_equal_questions() -> None:
    scene = generate_scene(rng(3), Style())
    assert scene_questions(scene, rng(4)) == scene_questions(scene, rng(4))
    assert small_talk_question(rng(5)) == small_talk_question(rng(5))
    assert [comparison_question(True).answer, comparison_question(False).answer] == ["yes", "no"]


def test_of_two_equally_frequent_shapes_the_alphabetically_first_is_counted() -> None:
    """The choice must not depend on the order of a set, which differs between processes."""
    shapes = tuple(Shape(name, "red", (0.0, 0.0, 9.0, 9.0)) for name in ("star", "circle", "square"))
    scene = Scene(448, 448, "plain", (220, 220, 220), shapes)
    texts = [q.text for i in range(60) for q in scene_questions(scene, rng(i)) if q.task == "count"]
    assert sum("circle" in text for text in texts) > 0.6 * len(texts)


def test_spelling_variants_keep_task_and_answer() -> None:
    question = Question("colour", "What colour is the cross?", "red")
    variants = [vary_spelling(question, rng(i)) for i in range(300)]
    assert {(variant.task, variant.answer) for variant in variants} == {("colour", "red")}
    normalised = {variant.text.lower().rstrip("?").replace("color", "colour") for variant in variants}
    assert normalised == {"what colour is the cross"}
    assert len({variant.text for variant in variants}) >= 4


def test_small_talk_fills_all_slots_of_its_templates() -> None:
    for i in range(300):
        for question in (small_talk_question(rng(i)), missing_image_question(rng(i))):
            assert question.text
            assert not set("{}") & set(question.text), question.text
            assert question.answer

"""Questions about a scene, with their answers."""

from dataclasses import dataclass

import numpy as np

from demo.scenes.scene import COLOURS, POSITIONS, SHAPES, Scene, Shape, position_index, relative_centre

TASKS = ("colour", "shape", "count", "place", "presence", "number", "same")
"""What `Question.task` may be, besides "other"."""


@dataclass(frozen=True)
class Question:
    """A question with the answer that the model should give. `task` is one of `TASKS`, or "other"."""

    task: str
    text: str
    answer: str


def scene_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Return one question of each task that the scene has an unambiguous answer to, in random order."""
    questions = [_count_question(scene, rng), _presence_question(scene, rng)]
    unique = [s for s in scene.shapes if _count(scene, s.name) == 1]
    if unique:
        shape = unique[rng.integers(len(unique))]
        questions.append(Question("colour", f"What colour is the {shape.name}?", shape.colour))
    placed = [s for s in unique if _has_clear_position(scene, s)]
    if placed:
        shape = placed[rng.integers(len(placed))]
        position = POSITIONS[position_index(*relative_centre(scene, shape.box))]
        questions.append(Question("place", f"Where is the {shape.name}?", position))
    colours = [s.colour for s in scene.shapes]
    unique_colour = [s for s in scene.shapes if colours.count(s.colour) == 1]
    if unique_colour:
        shape = unique_colour[rng.integers(len(unique_colour))]
        questions.append(Question("shape", f"What shape is the {shape.colour} object?", shape.name))
    if scene.number:
        questions.append(Question("number", "What number is written?", scene.number.text))
    return [questions[i] for i in rng.permutation(len(questions))]


def count_questions(scene: Scene) -> list[Question]:
    """Return a counting question for each kind of shape in the scene."""
    names = sorted({s.name for s in scene.shapes})
    return [Question("count", f"How many {plural(name)} are there?", str(_count(scene, name))) for name in names]


def absence_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Return questions about a shape or a number that the scene does not have."""
    questions = []
    absent = [s for s in SHAPES if _count(scene, s) == 0]
    if absent:
        name = str(rng.choice(absent))
        text = str(rng.choice([f"What colour is the {name}?", f"Where is the {name}?"]))
        questions.append(Question("other", text, f"There is no {name}."))
    if not scene.number:
        questions.append(Question("other", "What number is written?", "There is no number."))
    return questions


def comparison_question(same: bool) -> Question:
    """Return the question about two images."""
    return Question("same", "Are the two images the same?", "yes" if same else "no")


def vary_spelling(question: Question, rng: np.random.Generator) -> Question:
    """Return the question, sometimes with American spelling, a typing error, no capital or no question mark."""
    text = question.text
    if rng.random() < 0.25:
        text = text.replace("colour", "color")
    if rng.random() < 0.04:
        text = text.replace("crosses", "crosss")
    if rng.random() < 0.08:
        text = text.lower()
    if rng.random() < 0.06:
        text = text.rstrip("?")
    return Question(question.task, text, question.answer)


def plural(shape: str) -> str:
    """Return the plural of a shape's name."""
    return "crosses" if shape == "cross" else shape + "s"


def shape_kind(text: str) -> int:
    """Return the kind of the shape that a question names, as `PatchLabels.kind` numbers it."""
    return next(i for i, name in enumerate(SHAPES, 1) if name in text.lower())


def _count(scene: Scene, name: str) -> int:
    return sum(s.name == name for s in scene.shapes)


def _count_question(scene: Scene, rng: np.random.Generator) -> Question:
    """In most cases about the most frequent shape of the scene."""
    present = sorted({s.name for s in scene.shapes}, key=lambda name: (-_count(scene, name), name))
    name = present[0] if present and rng.random() < 0.75 else str(rng.choice(SHAPES))
    return Question("count", f"How many {plural(name)} are there?", str(_count(scene, name)))


def _presence_question(scene: Scene, rng: np.random.Generator) -> Question:
    """Half of the answers are yes. Many absent objects share colour or shape with a present one."""
    present = {(s.colour, s.name) for s in scene.shapes}
    if present and rng.random() < 0.5:
        colour, name = sorted(present)[rng.integers(len(present))]
    else:
        colour, name = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
        if present and rng.random() < 0.6:
            similar = sorted(present)[rng.integers(len(present))]
            colour, name = (similar[0], name) if rng.random() < 0.5 else (colour, similar[1])
    article = "an" if colour == "orange" else "a"
    return Question("presence", f"Is there {article} {colour} {name}?", "yes" if (colour, name) in present else "no")


def _has_clear_position(scene: Scene, shape: Shape) -> bool:
    """Whether the centre is more than 4 % away from the lines between the nine positions."""
    return all(abs(share - line) > 0.04 for share in relative_centre(scene, shape.box) for line in (1 / 3, 2 / 3))

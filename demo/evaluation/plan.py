"""The plan of an evaluation: images, questions and router settings, all derived from fixed seeds."""

import base64
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from demo.scenes.drawing import draw_scene, encode_image
from demo.scenes.generation import generate_near_pair, generate_pair, generate_scene
from demo.scenes.labels import tile_windows
from demo.scenes.scene import Scene
from demo.scenes.style import TILE_COUNTS, Style
from demo.text.questions import Question, comparison_question, scene_questions
from demo.text.small_talk import missing_image_question, small_talk_question

SEED = 2_000_000_000
"""First word of the seed of every generator here. Training uses its own, a far smaller one."""
TILE_TOKENS, COMPRESSED_TILE_TOKENS = 256, 64
"""Visual tokens of a tile on the long and on the short path."""
SINGLE_IMAGE_TASKS = ("colour", "shape", "count", "place", "presence", "number")
NEAR_PAIR_TASK = "same, one change"
STYLES = {"trained": Style(), "held out": Style(held_out=True)}
STREAMS = ("trained", "held out", "trained pairs", "held out pairs", "text", "router", "trained near", "held out near")
"""Names of question streams. The index of a stream is part of its seeds: add new ones at the end."""
_MAX_MISSING_IMAGE_QUESTIONS = 50
"""There are 76 different ones."""


@dataclass(frozen=True)
class ImageSetting:
    """How a request has its images processed, with a name. None leaves it to the server.

    Attributes:
        name: Name in answers and tables.
        vir: The request field `vir`.
        max_tiles: Maximum number of tiles of an image, the field `max_dynamic_patch`.
    """

    name: str
    vir: Mapping[str, Any] | None = None
    max_tiles: int | None = None


def _thresholds(relative: float, absolute: float) -> ImageSetting:
    vir = {"mode": "auto", "relative_threshold": relative, "absolute_threshold": absolute}
    return ImageSetting(f"relative {relative:g}, absolute {absolute:g}", vir)


SERVER_DEFAULT = ImageSetting("server's own")
ROUTER_MODES = tuple(ImageSetting(mode, {"mode": mode}) for mode in ("off", "auto", "all"))
ABSOLUTE_THRESHOLDS = tuple(_thresholds(0, value) for value in (0, 0.1, 0.25, 0.5, 0.75, 0.9))
RELATIVE_THRESHOLDS = tuple(_thresholds(value, 0.5) for value in (0.2, 0.4, 0.6, 0.8))
THRESHOLDS = (*ABSOLUTE_THRESHOLDS, *RELATIVE_THRESHOLDS)
TILE_BUDGETS = tuple(ImageSetting(f"at most {tiles} tiles", None, tiles) for tiles in (12, 6, 4))
"""No degradation, and what `--degrade-after` does at its two highest levels."""


@dataclass(frozen=True)
class PlannedRequest:
    """One request. Its name is unique, and changes with images, question, answer and setting."""

    name: str
    setting: ImageSetting
    question: Question


@dataclass(frozen=True)
class QuestionGroup:
    """Questions about the same images. They are sent one after another, so that the engine can reuse the image prefix."""

    stream: str
    index: int
    questions: tuple[Question, ...]
    scenes: tuple[Scene, ...] = ()
    style: Style = field(default_factory=Style)
    settings: tuple[ImageSetting, ...] = (SERVER_DEFAULT,)

    @property
    def requests(self) -> list[PlannedRequest]:
        """All questions with all settings."""
        digest = hashlib.blake2b(repr(self.scenes).encode(), digest_size=6).hexdigest()
        return [
            PlannedRequest(
                f"{self.stream}/{self.index}/{digest}/{setting.name}/{question.text}/{question.answer}", setting, question
            )
            for setting in self.settings
            for question in self.questions
        ]

    @property
    def uncompressed_tokens(self) -> int:
        """Visual tokens of the images without compression."""
        return TILE_TOKENS * sum(len(tile_windows(scene, self.style)) for scene in self.scenes)


def make_generator(stream: str, index: int, *more: int) -> np.random.Generator:
    """Return the generator of one group of a stream."""
    return np.random.default_rng([SEED, STREAMS.index(stream), index, *more])


def plan_accuracy(question_count: int, text_question_count: int) -> Iterator[QuestionGroup]:
    """Yield the groups of the accuracy part.

    Args:
        question_count: Questions of each task and style. A fifth as many near pairs come in addition.
        text_question_count: Questions without an image.
    """
    for stream, style in STYLES.items():
        yield from _plan_single_images(stream, style, question_count)
        for index in range(question_count):
            rng = make_generator(f"{stream} pairs", index)
            pair = generate_pair(rng, style, int(rng.choice(TILE_COUNTS)))
            yield QuestionGroup(f"{stream} pairs", index, (comparison_question(pair[0] == pair[1]),), pair, style)
        for index in range(question_count // 5):
            rng = make_generator(f"{stream} near", index)
            pair = generate_near_pair(rng, style, int(rng.choice(TILE_COUNTS)))
            question = replace(comparison_question(False), task=NEAR_PAIR_TASK)
            yield QuestionGroup(f"{stream} near", index, (question,), pair, style)
    yield from _plan_text(text_question_count)


def plan_router(image_count: int, settings: tuple[ImageSetting, ...]) -> Iterator[QuestionGroup]:
    """Yield images of two and more tiles. Four of five have a number: compression costs numbers first."""
    for index in range(image_count):
        rng = make_generator("router", index)
        tile_count = int(rng.choice([count for count in TILE_COUNTS if count > 1]))
        scene = generate_scene(rng, Style(), tile_count)
        while index % 5 and scene.number is None:
            scene = generate_scene(rng, Style(), tile_count)
        # sampled twice: the second time often gives questions about other objects
        questions = dict.fromkeys([*scene_questions(scene, rng), *scene_questions(scene, rng)])
        yield QuestionGroup("router", index, tuple(questions), (scene,), settings=settings)


def image_data_urls(group: QuestionGroup) -> list[str]:
    """Return the images as data URLs. All images of a group are encoded alike, so that equal scenes give equal files."""
    urls = []
    for scene in group.scenes:
        data = encode_image(draw_scene(scene), make_generator(group.stream, group.index, 1))
        kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
        urls.append(f"data:image/{kind};base64,{base64.b64encode(data).decode()}")
    return urls


def _plan_single_images(stream: str, style: Style, question_count: int) -> Iterator[QuestionGroup]:
    """Yield images until every task has enough questions. A task that has enough gets no more."""
    remaining = dict.fromkeys(SINGLE_IMAGE_TASKS, question_count)
    for index in itertools.count():
        if not any(remaining.values()):
            return
        rng = make_generator(stream, index)
        scene = generate_scene(rng, style)
        questions = tuple(question for question in scene_questions(scene, rng) if remaining[question.task])
        for question in questions:
            remaining[question.task] -= 1
        if questions:
            yield QuestionGroup(stream, index, questions, (scene,), style)


def _plan_text(count: int) -> Iterator[QuestionGroup]:
    """Yield `count` different questions without an image. A third of them, at most 50, are about an image."""
    texts: set[str] = set()
    for index in itertools.count():
        if len(texts) == count:
            return
        rng = make_generator("text", index)
        if len(texts) < min(count // 3, _MAX_MISSING_IMAGE_QUESTIONS):
            question = replace(missing_image_question(rng), task="no image")
        else:
            question = replace(small_talk_question(rng), task="small talk")
        if question.text not in texts:
            texts.add(question.text)
            yield QuestionGroup("text", index, (question,))

"""Batches of images with conversations about them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from demo.batches.tiles import cut_tiles, scene_targets, tile_crop_origins
from demo.batches.types import ConversationBatch, ConversationRows, PatchTargets
from demo.scenes.drawing import draw_scene
from demo.scenes.generation import generate_near_pair, generate_pair, generate_scene
from demo.scenes.labels import FIRST_DIGIT
from demo.scenes.scene import Scene
from demo.scenes.style import TILE_COUNTS, Style
from demo.text.questions import (
    Question,
    absence_questions,
    comparison_question,
    count_questions,
    scene_questions,
    shape_kind,
    vary_spelling,
)
from demo.text.small_talk import (
    DESCRIPTION_ANSWER,
    DESCRIPTION_QUESTIONS,
    SYSTEM_PROMPTS,
    missing_image_question,
    small_talk_question,
)
from demo.text.tokenizer import IGNORED_LABEL, DemoTokenizer

Conversation = list[Question]
_TEXT_CONVERSATIONS = 6


def conversation_batch(
    rng: np.random.Generator,
    tokenizer: DemoTokenizer,
    style: Style,
    tile_budget: int,
    tile_counts: tuple[int, ...] = (),
    pair_share: float = 0.2,
    near_pair_share: float = 0.12,
    extra_questions: float = 1.0,
    labelled: bool = True,
    descriptions: bool = False,
) -> ConversationBatch:
    """Return a batch of images of equal tile count.

    Args:
        rng: Source of all randomness.
        tokenizer: Tokenizer of the conversations.
        style: Distribution of the scenes.
        tile_budget: Approximate number of tiles in the batch.
        tile_counts: Allowed tiles per image, thumbnail not counted; by default any that the style has.
        pair_share: Fraction of the batches that compare two images.
        near_pair_share: Fraction of the pairs that differ in one object only.
        extra_questions: Factor on the frequency of questions outside the seven tasks.
        labelled: Whether the patches come with labels.
        descriptions: Whether there is also an open question about each image or pair.
    """
    count = int(rng.choice(tile_counts or ((1,) if style.max_tiles == 1 else TILE_COUNTS)))
    tiles = count + (count > 1)
    images = max(1, round(tile_budget / tiles))
    paired = pair_share > 0 and rng.random() < (pair_share if images > 1 else pair_share / 2)
    pairs: list[tuple[Scene, Scene]] = []
    if paired:
        makers = [generate_near_pair if rng.random() < near_pair_share else generate_pair for _ in range(max(1, images // 2))]
        pairs = [make(rng, style, count) for make in makers]
        scenes, images = [scene for pair in pairs for scene in pair], 2 * len(pairs)
    else:
        scenes = [generate_scene(rng, style, count) for _ in range(images)]
    scene_tiles = [cut_tiles(draw_scene(scene), style) for scene in scenes]
    if paired:
        conversations = [[[comparison_question(first == second)]] for first, second in pairs]
    else:
        turns = 2 if rng.random() < 0.1 else 1
        rounds = 2 if count > 1 else 1
        conversations = [_scene_conversations(rng, scene, rounds, turns, extra_questions, style.hard) for scene in scenes]
    if descriptions:
        for row in conversations:
            row.append([Question("other", str(rng.choice(DESCRIPTION_QUESTIONS)), DESCRIPTION_ANSWER)])
    rows, tasks, counted = _pack(tokenizer, conversations, "\n")
    targets = scene_targets(scenes, style) if labelled else None
    compressed = _random_paths(rng, images, tiles, targets if style.hard else None)
    if paired and rng.random() < 0.7:  # the router treats two equal images alike
        compressed[1::2] = compressed[::2]
    texts = [
        [small_talk_question(rng) if rng.random() < 0.8 else missing_image_question(rng)] for _ in range(_TEXT_CONVERSATIONS)
    ]
    system = f"<|im_start|>system\n{rng.choice(SYSTEM_PROMPTS)}<|im_end|>\n" if rng.random() < 0.3 else ""
    return ConversationBatch(
        tiles=torch.from_numpy(np.concatenate(scene_tiles)),
        crop_origins=torch.tensor([origin for scene in scenes for origin in tile_crop_origins(scene, tiles)]),
        targets=targets,
        compressed=compressed,
        images_per_prefix=2 if paired else 1,
        opening=tokenizer.encode(f"{system}<|im_start|>user\n<img>"),
        separator=tokenizer.encode("</img>\n<img>"),
        closing=tokenizer.encode("</img>"),
        rows=rows,
        tasks=tasks,
        counted=counted,
        text_rows=_pack(tokenizer, [texts], "<|im_start|>user\n")[0],
    )


def mixed_style_batch(
    rng: np.random.Generator,
    tokenizer: DemoTokenizer,
    main: tuple[Style, int],
    other: tuple[Style, int],
    main_share: float = 0.75,
    **options: Any,
) -> ConversationBatch:
    """Return a `conversation_batch` with the style and tile budget of `main` or `other`.

    `main_share`: fraction of the batches that use `main`.
    """
    style, tile_budget = main if rng.random() < main_share else other
    return conversation_batch(rng, tokenizer, style, tile_budget, **options)


def _scene_conversations(
    rng: np.random.Generator, scene: Scene, rounds: int, turns: int, extra_questions: float, hard: bool
) -> list[Conversation]:
    """Return conversations of `turns` turns about a scene. Questions are sampled `rounds` times."""
    questions: list[Question] = count_questions(scene) if hard else []
    for _ in range(rounds):
        questions += [q for q in scene_questions(scene, rng) if q not in questions]
    absent = absence_questions(scene, rng)
    if absent and rng.random() < 0.4 * extra_questions:
        questions.append(absent[rng.integers(len(absent))])
    if rng.random() < 0.2 * extra_questions:
        talk = small_talk_question(rng)
        if len(talk.text) + len(talk.answer) < 50:
            questions.append(talk)
    varied = [vary_spelling(question, rng) for question in questions]
    return [varied[i : i + turns] for i in range(0, len(varied), turns)]


def _pack(
    tokenizer: DemoTokenizer, conversations: list[list[Conversation]], prefix: str
) -> tuple[ConversationRows, list[str], list[tuple[int, int]]]:
    """Pack the conversations of each prefix into a row. Return rows, tasks and counted shapes, in order."""
    sequences: list[list[tuple[int, int, int, int]]] = []
    tasks: list[str] = []
    counted: list[tuple[int, int]] = []
    for row in conversations:
        sequence: list[tuple[int, int, int, int]] = []
        for turns in row:
            ids, labels = tokenizer.encode_conversation(turns, prefix)
            sequence += zip(ids, labels, range(len(ids)), [len(tasks)] * len(ids), strict=True)
            tasks.append(turns[0].task if len(turns) == 1 else "chain")
            counted.append((shape_kind(turns[0].text), int(turns[0].answer)) if tasks[-1] == "count" else (0, 0))
        sequences.append(sequence)
    length = max(map(len, sequences))
    padded = [sequence + [(0, IGNORED_LABEL, 0, -1)] * (length - len(sequence)) for sequence in sequences]
    return ConversationRows(*torch.tensor(padded).unbind(-1)), tasks, counted


def _random_paths(rng: np.random.Generator, images: int, tiles: int, targets: PatchTargets | None) -> Tensor:
    """Return which tiles are compressed: none, all, or equally many in each image, bool [images, tiles].

    With `targets`, tiles with digits are compressed less often, as the router decides.
    """
    kind = rng.random()
    if kind < 0.4 or (tiles == 1 and kind < 0.6):
        return torch.zeros(images, tiles, dtype=torch.bool)
    if kind < 0.55 or tiles == 1:
        return torch.ones(images, tiles, dtype=torch.bool)
    compressed_count = int(rng.integers(1, tiles))
    order = rng.random((images, tiles))
    if targets is not None:
        order += 0.8 * (targets.kind >= FIRST_DIGIT).any(-1).view(images, tiles).numpy()
    return torch.from_numpy(order.argsort(1).argsort(1) < compressed_count)

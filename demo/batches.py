"""Batches for each stage of training, made from nothing but a seed and a step's number: a run can go on where it stopped."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from demo import scenes
from demo.scenes import Labels, Scene, Style, Tile
from demo.words import SYSTEM, Asked, Words, absent, blind, compared, counts, questions, shape_of, small_talk, spoken
from vision_worker.preprocessing import tiling

Generator = np.random.Generator


def cut(image: Image.Image, style: Style) -> npt.NDArray[np.uint8]:
    """Tiles uint8 [n, tile, tile, 3] as the vision worker cuts them."""
    return tiling.cut_image(image, style.tiling).pixels


@dataclass
class Patches:
    """Labels of each patch as `scenes.Labels` has them, int64 [n, patches] each, −1 for unknown."""

    kind: Tensor
    colour: Tensor
    order: Tensor
    turn: Tensor
    place: Tensor
    middle: Tensor


@dataclass
class Dense:
    """Tiles uint8 [n, side, side, 3] and what their patches show.

    `corners` [n, 2]: see `Trainee.look`. `outline` bool [n, patches, 49]: which squares of two pixels of a patch stand out
    from the background.
    """

    tiles: Tensor
    corners: Tensor
    outline: Tensor
    told: Patches


def dense(rng: Generator, styles: tuple[Style, ...], count: int, crowds: float = 0.0) -> Dense:
    """As many tiles of each style; of the pictures that are one tile, a share of `crowds` is full of things."""
    tiles: list[npt.NDArray[np.uint8]] = []
    corners: list[tuple[int, int]] = []
    outlines: list[npt.NDArray[np.bool_]] = []
    found: list[Labels] = []
    while len(tiles) < count:
        chosen = styles[len(tiles) * len(styles) // count]
        crowded = crowds and chosen.max_tiles == 1 and rng.random() < crowds
        scene = scenes.crowd(rng, chosen) if crowded else scenes.scene(rng, chosen)
        cuts, windows = cut(scenes.draw(scene), chosen), scenes.windows(scene, chosen)
        told = [scenes.labels(scene, window, chosen.tile // scenes.PATCH) for window in windows]
        places = _corners(scene, len(cuts))
        for i in _interesting(rng, windows, told):
            tiles.append(cuts[i])
            corners.append(places[i])
            outlines.append(_outline(cuts[i], scene))
            found.append(told[i])
    return Dense(
        torch.from_numpy(np.stack(tiles[:count])), torch.tensor(corners[:count]),
        torch.from_numpy(np.stack(outlines[:count])), _patches(found[:count]),
    )  # fmt: skip


def _corners(scene: Scene, tiles: int) -> list[tuple[int, int]]:
    """Of each tile, the last being the whole picture. The same for scenes that differ in one thing only."""
    rng = np.random.default_rng(scene.seed)
    others = [scenes.corner(rng, scene.piece[2] * scenes.PATCH)[:2] for _ in range(tiles - 1)]
    return [*others, scene.piece[:2]]


def _outline(tile: npt.NDArray[np.uint8], scene: Scene) -> npt.NDArray[np.bool_]:
    """Of each patch, row by row, its 7 × 7 squares; the background's texture is fainter than any colour on it."""
    cells = tile[::2, ::2].astype(np.int16) - np.array(scene.background, np.int16)
    side = tile.shape[0] // scenes.PATCH
    covered: npt.NDArray[np.bool_] = np.abs(cells).max(-1) > 45
    return covered.reshape(side, 7, side, 7).swapaxes(1, 2).reshape(side * side, 49)


def _interesting(rng: Generator, windows: list[Tile], told: list[Labels]) -> list[int]:
    """The whole picture, and up to three tiles, rather ones with something in them."""
    parts = [i for i, window in enumerate(windows) if not window.whole]
    full = [i for i in parts if told[i].things]
    chosen = [int(i) for i in rng.permutation(full)[:3]]
    if parts and rng.random() < 0.2:
        chosen.append(int(rng.choice(parts)))
    return [i for i, window in enumerate(windows) if window.whole] + chosen


def _patches(found: list[Labels]) -> Patches:
    parts = (np.stack([getattr(labels, part.name) for labels in found]) for part in fields(Patches))
    return Patches(*(torch.from_numpy(part).flatten(1).long() for part in parts))


@dataclass
class Rows:
    """Conversations side by side in one sequence a prefix, [prefixes, length] each, padded on the right.

    They follow the prefix and do not see each other.
    """

    ids: Tensor
    answers: Tensor  # the token that is to follow, −100 where that is not the model's to say
    places: Tensor  # in the conversation, from 0
    numbers: Tensor  # of the conversation among all of the batch, −1 for padding

    @property
    def told(self) -> Tensor:
        """Tokens that are to be said, one after another, [told]."""
        return self.answers[self.answers >= 0]


@dataclass
class Talk:
    """Images with the same number of tiles, one or two to a prefix, and texts that follow the prefixes.

    `opening`, `between` and `end` are the tokens before the first image, between two and after the last; `compressed` bool
    [images, tiles] says which tiles take the short path: as many in each prefix. `texts` stand alone, without an image.
    """

    tiles: Tensor  # uint8 [images · tiles, side, side, 3]
    corners: Tensor  # [images · tiles, 2]
    told: Patches | None
    compressed: Tensor
    together: int  # images to a prefix
    opening: list[int]
    between: list[int]
    end: list[int]
    rows: Rows
    tasks: list[str]
    sought: list[tuple[int, int]]  # beside each task, of one that counts: which shape as `Labels.kind` has it, and how many
    texts: Rows

    @property
    def told_apart(self) -> Patches | None:
        """The labels, where each image has a prefix to itself."""
        return self.told if self.together == 1 else None

    @property
    def path(self) -> str:
        """Which path the tiles take: long, short or mixed."""
        return "short" if bool(self.compressed.all()) else "mixed" if bool(self.compressed.any()) else "long"


def talk(
    rng: Generator,
    words: Words,
    style: Style,
    budget: int,
    sizes: tuple[int, ...] = (),
    pairs: float = 0.2,
    near: float = 0.12,
    extras: float = 1.0,
    labelled: bool = True,
) -> Talk:
    """About `budget` tiles in all.

    `sizes`: tiles of an image, thumbnail not counted, if not any that the style has; `pairs`: share of the batches that
    compare two images, `near` of which differ in one thing only; `extras`: how often more is asked than the tasks;
    `labelled`: whether patches come with labels.
    """
    count = int(rng.choice(sizes or ((1,) if style.max_tiles == 1 else scenes.TILES)))
    tiles = count + (count > 1)
    images = max(1, round(budget / tiles))
    paired = pairs > 0 and rng.random() < (pairs if images > 1 else pairs / 2)
    couples: list[tuple[Scene, Scene]] = []
    if paired:
        drawn = [scenes.near_pair if rng.random() < near else scenes.pair for _ in range(max(1, images // 2))]
        couples = [draw(rng, style, count) for draw in drawn]
        every, images = [scene for two in couples for scene in two], 2 * len(couples)
    else:
        every = [scenes.scene(rng, style, count) for _ in range(images)]
    cuts = [cut(scenes.draw(scene), style) for scene in every]
    if paired:
        asked = [[[compared(first == second)]] for first, second in couples]
    else:
        turns = 2 if rng.random() < 0.1 else 1
        asked = [_asked(rng, scene, 2 if count > 1 else 1, turns, extras, style.drill) for scene in every]
    rows, tasks, sought = _rows(words, asked, "\n")
    told = _told(every, style) if labelled else None
    routes = _routes(rng, images, tiles, told if style.drill else None)
    if paired and rng.random() < 0.7:  # as a router does with two images alike
        routes[1::2] = routes[::2]
    alone = [[small_talk(rng) if rng.random() < 0.8 else blind(rng)] for _ in range(6)]
    system = f"<|im_start|>system\n{rng.choice(SYSTEM)}<|im_end|>\n" if rng.random() < 0.3 else ""
    return Talk(
        torch.from_numpy(np.concatenate(cuts)), torch.tensor([c for s in every for c in _corners(s, tiles)]),
        told, routes, 2 if paired else 1,
        words.encode(f"{system}<|im_start|>user\n<img>"), words.encode("</img>\n<img>"), words.encode("</img>"), rows, tasks,
        sought, _rows(words, [alone], "<|im_start|>user\n")[0],
    )  # fmt: skip


def either(
    rng: Generator, words: Words, often: tuple[Style, int], now_and_then: tuple[Style, int], share: float = 0.75, **rest: Any
) -> Talk:
    """`talk` in one style with its budget in a `share` of all batches, else in the other."""
    style, budget = often if rng.random() < share else now_and_then
    return talk(rng, words, style, budget, **rest)


def _told(every: list[Scene], style: Style) -> Patches:
    windows = [(scene, window) for scene in every for window in scenes.windows(scene, style)]
    return _patches([scenes.labels(scene, window, style.tile // scenes.PATCH) for scene, window in windows])


def _asked(rng: Generator, scene: Scene, times: int, turns: int, extras: float, drill: bool) -> list[list[Asked]]:
    """Conversations of so many turns about a scene."""
    found: list[Asked] = counts(scene) if drill else []
    for _ in range(times):
        found += [q for q in questions(scene, rng) if q not in found]
    extra = absent(scene, rng)
    if extra and rng.random() < 0.4 * extras:
        found.append(extra[rng.integers(len(extra))])
    if rng.random() < 0.2 * extras:
        found += [talk for talk in [small_talk(rng)] if len(talk.question) + len(talk.answer) < 50]
    said = [spoken(asked, rng) for asked in found]
    return [said[i : i + turns] for i in range(0, len(said), turns)]


def _rows(words: Words, asked: list[list[list[Asked]]], opening: str) -> tuple[Rows, list[str], list[tuple[int, int]]]:
    """Conversations by prefix; of each, in order, the task and what is sought."""
    sequences: list[list[tuple[int, int, int, int]]] = []
    tasks: list[str] = []
    sought: list[tuple[int, int]] = []
    for conversations in asked:
        sequence: list[tuple[int, int, int, int]] = []
        for turns in conversations:
            ids, told = words.conversation(turns, opening)
            sequence += zip(ids, told, range(len(ids)), [len(tasks)] * len(ids), strict=True)
            tasks.append(turns[0].task if len(turns) == 1 else "chain")
            sought.append((shape_of(turns[0].question), int(turns[0].answer)) if tasks[-1] == "count" else (0, 0))
        sequences.append(sequence)
    length = max(map(len, sequences))
    padded = [sequence + [(0, -100, 0, -1)] * (length - len(sequence)) for sequence in sequences]
    return Rows(*torch.tensor(padded).unbind(-1)), tasks, sought


def _routes(rng: Generator, images: int, tiles: int, told: Patches | None) -> Tensor:
    """The long path for all tiles, the short one for all, or for some in each image alike in number.

    With what is `told` of the tiles, those with digits rather take the long one, as a router has them.
    """
    kind = rng.random()
    if kind < 0.4 or (tiles == 1 and kind < 0.6):
        return torch.zeros(images, tiles, dtype=torch.bool)
    if kind < 0.55 or tiles == 1:
        return torch.ones(images, tiles, dtype=torch.bool)
    small = int(rng.integers(1, tiles))
    lots = rng.random((images, tiles))
    if told is not None:
        lots += 0.8 * (told.kind >= 7).any(-1).view(images, tiles).numpy()
    return torch.from_numpy(lots.argsort(1).argsort(1) < small)


class Batches(Dataset[Any]):
    """Item i is step i's batch."""

    def __init__(self, make: Any, seed: int, stage: str, first: int, steps: int) -> None:
        self.make, self.seed, self.stage, self.first, self.steps = make, seed, stage, first, steps

    def __len__(self) -> int:
        return self.steps - self.first

    def __getitem__(self, index: int) -> Any:
        torch.set_num_threads(1)
        stage = int.from_bytes(self.stage.encode(), "little") % 2**32
        return self.make(np.random.default_rng([self.seed, stage, self.first + index]))


def loaded(batches: Batches, workers: int) -> Iterator[Any]:
    return iter(DataLoader(batches, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None))


def moved(value: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{part.name: moved(getattr(value, part.name), device) for part in fields(value)})
    return value

"""Train the bundled checkpoint from nothing: `python -m demo.train`. Stops and goes on where it was at any time.

Stages, each with its own batches (demo/batches.py):

1. dense        the tower alone learns which thing covers each patch, on pieces of tiles, 224 pixels wide
2. questions    projectors and language model learn to answer about one such piece, over a tower that stays
3. together     the same, the tower learning on with them
4. large        the tower again, on tiles of 448 pixels
5. tiles, full, mixed   answers about pictures of several tiles and a thumbnail: small tiles, large ones, both
6. drill        long numbers and many of one shape, over a tower that stays
7. alone, many, whole, sight   both again: in one small tile, in several, and in pictures as they are served; between the
   last two, compare: pairs of pictures of several tiles
8. across, polish, precision, recount, refine    pictures as they are served, over a tower that stays, then gently with it;
   in the last two more attentions count
9. consistency  the short path learns to answer as the long one (ViCO's first half, demo/vico.py)
10. gathering, settling   the last layer's MLP learns from many answers at once (demo/settling.py)
11. judging     what the short path costs, tile by tile
12. router      the router learns from that which tiles to compress
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo import batches, looking, model, scenes, settling, vico
from demo.looking import Looking, by_token
from demo.scenes import Style
from demo.words import Words

RELATIVE, ABSOLUTE = 0.0, 0.6
"""The router's thresholds that are shipped: demo/README.md says what they save."""

KINDS, COLOURS, ORDERS, PLACES = 17, 9, 4, 9
MARKS = 4, 6  # which digit of the number, and the how manieth of its shape


class Heads(nn.Module):
    """What the dense stage reads from each patch's features; thrown away afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(model.WIDTH)
        self.outline = nn.Sequential(nn.LayerNorm(model.WIDTH), nn.Linear(model.WIDTH, 49))
        self.around = nn.Sequential(nn.LayerNorm(model.WIDTH), nn.Linear(model.WIDTH, 25 * 9))
        self.differs = nn.Linear(model.HIDDEN, 1)
        self.marks = nn.Linear(model.HIDDEN, sum(MARKS))
        self.read = nn.Linear(model.WIDTH, KINDS + COLOURS + ORDERS + PLACES + 2)

    def forward(self, features: Tensor, told: batches.Patches) -> tuple[Tensor, dict[str, float]]:
        read = self.read(self.norm(features)).flatten(0, 1)
        kind, colour, order, place, middle = read.split([KINDS, COLOURS, ORDERS, PLACES, 2], dim=-1)

        def rare(classes: int) -> Tensor:  # most patches show nothing
            return torch.tensor([0.2] + [1.0] * (classes - 1), device=features.device)

        losses = {
            "kind": F.cross_entropy(kind, told.kind.flatten(), rare(KINDS), ignore_index=-1),
            "colour": F.cross_entropy(colour, told.colour.flatten(), rare(COLOURS), ignore_index=-1),
            "order": _some(order, told.order.flatten()),
            "place": _some(place, told.place.flatten()),
            # not rare: what it says of the patches of one thing must add up to one, for there is counting to be done
            "middle": F.cross_entropy(middle, told.middle.flatten()),
        }
        shown = {name: float(value.detach()) for name, value in losses.items()}
        shape, digit = (told.kind.flatten() > 0) & (told.kind.flatten() < 7), told.kind.flatten() >= 7
        for name, chosen in (("shape ok", shape), ("digit ok", digit)):
            shown[name] = float((kind.argmax(-1) == told.kind.flatten())[chosen].float().mean())
        weights = {"kind": 1.0, "colour": 0.5, "order": 0.5, "place": 0.3, "middle": 3.0}
        return torch.stack([weights[name] * value for name, value in losses.items()]).sum(), shown


def _some(logits: Tensor, told: Tensor) -> Tensor:
    """Cross entropy where anything is told at all."""
    if not bool((told >= 0).any()):
        return logits.sum() * 0
    return F.cross_entropy(logits, told, ignore_index=-1)


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    rate: float  # of learning, at the peak


class Run:
    """State of a training run and its files: `latest.pt` to go on from, `log.jsonl` with a line every 20 steps."""

    def __init__(self, folder: Path, seed: int, workers: int) -> None:
        self.folder, self.seed, self.workers = folder, seed, workers
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(seed)
        self.words = Words()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.Trainee(self.words).to(self.device)
        self.model.mixed = model.quicker_in_bf16(self.device)
        self.heads = Heads().to(self.device)
        self.done: dict[str, int] = {}
        self.seconds = 0.0
        self.state: dict[str, Any] = {}
        latest = folder / "latest.pt"
        if latest.exists():
            self._restore(torch.load(latest, map_location=self.device, weights_only=False))

    def _restore(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.heads.load_state_dict(saved["heads"])
        self.done, self.seconds, self.state = saved["done"], saved["seconds"], saved["state"]

    def save(self, optimiser: torch.optim.Optimizer) -> None:
        everything = {
            "model": self.model.state_dict(), "heads": self.heads.state_dict(), "done": self.done, "seconds": self.seconds,
            "state": optimiser.state_dict(),
        }  # fmt: skip
        _replace(self.folder / "latest.pt", everything)

    def stage(self, stage: Stage, make: Any, step: Any, parameters: list[dict[str, Any]]) -> None:
        """Run `step(batch) -> (loss, figures)` for every batch that `make(rng)` makes and that is not done yet."""
        first = self.done.get(stage.name, 0)
        optimiser = torch.optim.AdamW(parameters, lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
        shares = [group.get("share", 1.0) for group in optimiser.param_groups]
        if first:
            optimiser.load_state_dict(self.state)
        every = [p for group in parameters for p in group["params"]]
        data = batches.loaded(batches.Batches(make, self.seed, stage.name, first, stage.steps), self.workers)
        sums: dict[str, list[float]] = {}
        began = last = time.monotonic()
        for number in range(first, stage.steps):
            rate = stage.rate * _schedule(number, stage.steps)
            loss, shown = step(batches.moved(next(data), self.device))
            loss.backward()
            shown["gradient"] = float(nn.utils.clip_grad_norm_(every, 1.0))
            for group, share in zip(optimiser.param_groups, shares, strict=True):
                group["lr"] = rate * share
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            now = time.monotonic()
            self.seconds += now - last
            last = now
            for name, value in shown.items():
                sums.setdefault(name, []).append(value)
            self.done[stage.name] = number + 1
            if (number + 1) % 20 == 0 or number + 1 == stage.steps:
                means = {name: _mean(values) for name, values in sums.items()}
                self.tell(stage, number + 1, means, rate, (now - began) / (number + 1 - first))
                sums = {}
            if (number + 1) % 100 == 0 or number + 1 == stage.steps:
                self.save(optimiser)

    def tell(self, stage: Stage, done: int, shown: dict[str, float], rate: float, pace: float) -> None:
        line = {"stage": stage.name, "step": done, "seconds": round(self.seconds), "rate": rate}
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line | {name: round(value, 4) for name, value in shown.items()}) + "\n")
        left = (stage.steps - done) * pace / 60
        figures = "  ".join(f"{name} {value:.3f}" for name, value in shown.items())
        print(f"{stage.name} {done}/{stage.steps}  {left:.0f} min left  {pace:.2f} s a step  {figures}", flush=True)


def _replace(file: Path, value: Any) -> None:
    """Written in full or not at all."""
    torch.save(value, file.with_suffix(".new"))
    os.replace(file.with_suffix(".new"), file)


def _mean(values: list[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else float("nan")


def _schedule(step: int, steps: int) -> float:
    """Warm-up over the first hundred steps at most, then a cosine to a twentieth."""
    warm = min(100, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


SINGLE = Style(tile=224, max_tiles=1, smallest_digit=28, smallest_shape=0.18, largest=800, longest=2)
CROWDED = replace(SINGLE, largest=500)
LARGE = Style(max_tiles=1, smallest_shape=0.1, largest=700, longest=2)
SMALL = Style(tile=224, smallest_digit=28, smallest_shape=0.18)
ALONE = replace(SMALL, max_tiles=1, largest=1000, longest=2, smallest_digit=40, smallest_shape=0.2, drill=True)
DRILL, WHOLE = replace(SMALL, smallest_digit=40, drill=True), Style(drill=True)


def learn_patches(run: Run, stage: Stage, styles: tuple[Style, ...], count: int, lean: float) -> None:
    """The first layer learns a patch's outlines whatever the colours, the second those of the 5 × 5 patches around it.

    Left alone, a tower finds out late that a thing is known by the patches around: shapes stayed at chance for 600 steps.
    """
    layers = run.model.vision.vision_model.encoder.layers
    seen: dict[int, Tensor] = {}
    hooks = [layers[i].register_forward_hook(partial(_keep, seen, i)) for i in (0, 1)]

    def step(batch: batches.Dense) -> tuple[Tensor, dict[str, float]]:
        loss, shown = run.heads(run.model.forward(batch.tiles, batch.corners), batch.told)
        told = batch.outline.float()
        outline = F.binary_cross_entropy_with_logits(run.heads.outline(seen[0]), told)
        around = F.binary_cross_entropy_with_logits(run.heads.around(seen[1]), _around(told))
        shown |= {"outline": float(outline.detach()), "around": float(around.detach())}
        return loss + lean * (outline + 4 * around), {"loss": float(loss.detach()), **shown}

    tower = run.model.vision.vision_model.parameters()
    run.stage(
        stage,
        partial(batches.dense, styles=styles, count=count, crowds=0.9),
        step,
        [{"params": [*tower, *run.heads.parameters()]}],
    )
    for hook in hooks:
        hook.remove()


def _keep(seen: dict[int, Tensor], layer: int, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
    seen[layer] = output[:, 1:]


def _around(outline: Tensor) -> Tensor:
    """Outlines [n, patches, 49] to those of the 5 × 5 patches around each, 3 × 3 points of each, [n, patches, 225]."""
    side = round(outline.shape[1] ** 0.5)
    points = outline.view(-1, side * side, 7, 7)[..., ::3, ::3].flatten(-2)
    return F.unfold(points.mT.reshape(-1, 9, side, side), 5, padding=2).mT


def judged(logits: Tensor, rows: batches.Rows, tasks: list[str]) -> dict[str, float]:
    """Share of rows of each task whose answer is right to the last token."""
    asked = rows.answers >= 0
    wrong = torch.zeros(len(tasks), dtype=torch.long, device=logits.device)
    wrong.index_add_(0, rows.numbers[asked], (logits.argmax(-1) != rows.answers[asked]).long())
    by_task: dict[str, list[float]] = {}
    for task, mistakes in zip(tasks, wrong.tolist(), strict=True):
        by_task.setdefault(task, []).append(float(mistakes == 0))
    return {task: sum(right) / len(right) for task, right in by_task.items()}


def _difference(heads: Heads, read: model.Read, batch: batches.Talk) -> Tensor:
    """Of the second image's tokens, whether the first image shows something else there; one answer in two teaches little.

    Binary cross entropy, both sides weighing the same.
    """
    side = batch.tiles.shape[1]
    images, tiles = batch.compressed.shape
    pixels = batch.tiles.view(images // 2, 2, tiles, side, side, 3).short()
    changed = ((pixels[:, 0] - pixels[:, 1]).abs().amax(-1) > 30).float()  # [pairs, tiles, side, side]
    spans = torch.where(batch.compressed[1::2], 4, 2) * scenes.PATCH  # pixels to a token's side
    told = [
        torch.cat([F.max_pool2d(tile[None], span).flatten() for tile, span in zip(one, wide, strict=True)])
        for one, wide in zip(changed, spans.tolist(), strict=True)
    ]
    differs = torch.stack(told)
    end = read.hidden.shape[1] - len(batch.end)
    seen = heads.differs(read.hidden[:, end - differs.shape[1] : end])[..., 0]
    share = differs.mean().clamp(0.02, 0.98)
    weights = torch.where(differs > 0, 0.5 / share, 0.5 / (1 - share))
    return F.binary_cross_entropy_with_logits(seen, differs, weights)


def _marks(told: batches.Patches, compressed: Tensor) -> tuple[Tensor, Tensor]:
    """Of each visual token, [images, tokens]: its place in a number, and the how manieth of its shape it is; −1 for neither.

    A number that a tile's border cuts is only then read in order if its digits are told apart by all of it; counting is
    done in the tile that shows the whole picture, token by token, from 0 to 5. What a token has two of is not told.
    """
    turns = by_token(looking.turns(told), compressed) > 0
    turn = torch.where(turns.sum(1) == 1, turns.int().argmax(1), -1)
    here = by_token(looking.middles(told), compressed)
    so_far = (here.cumsum(2) * here).amax(1)
    return turn, torch.where((here.sum(1) == 1) & (so_far <= MARKS[1]), so_far - 1, -1).long()


def _marked(heads: Heads, read: model.Read, batch: batches.Talk, told: batches.Patches) -> tuple[Tensor, dict[str, float]]:
    """Cross entropy of `_marks` as they are read off the language model's middle."""
    seen = heads.marks(read.hidden[:, len(batch.opening) : read.hidden.shape[1] - len(batch.end)])
    total, shown = seen.sum() * 0, dict[str, float]()
    for name, logits, truth in zip(("turn", "counted"), seen.split(MARKS, dim=-1), _marks(told, batch.compressed), strict=True):
        known = truth >= 0
        if bool(known.any()):
            total = total + F.cross_entropy(logits[known], truth[known])
            shown[name] = float((logits[known].argmax(-1) == truth[known]).float().mean())
    return total, shown


SHARPNESS = ("q_norm.weight", "k_norm.weight")
"""What bounds an attention's logits in Qwen3: at 1, by 8, which one token among 3,000 needs to get half of it. At ten times
the others' rate of learning the largest of these weights went from 1.2 to 1.5 in *across*."""


def learn_answers(run: Run, stage: Stage, make: Callable[..., batches.Talk], tower: float, recount: bool = False) -> None:
    """`make`: batches, but for the words; `tower`: its rate of learning as a share of the rest's, at 0 it stays as it is.

    `recount`: more attentions count, and where all of them look weighs more.
    """
    attentions = Looking(run.model, looking.RECOUNTS, stress=1.0) if recount else Looking(run.model)

    def step(batch: batches.Talk) -> tuple[Tensor, dict[str, float]]:
        with torch.set_grad_enabled(tower > 0):
            features = run.model.forward(batch.tiles, batch.corners)
        read = run.model.read(run.model.prefixes(batch, features, batch.compressed))
        logits = run.model.answer(read, batch.rows)
        answers = F.cross_entropy(logits, batch.rows.told)
        looked, extra = attentions.loss(read, batch)
        total = answers + looked
        if batch.told_apart is not None:
            marked, marks = _marked(run.heads, read, batch, batch.told_apart)
            total, extra = total + 0.2 * marked, extra | marks
        texts = F.cross_entropy(run.model.answer(None, batch.texts), batch.texts.told)
        total = total + 0.1 * texts
        if batch.together == 2:
            difference = _difference(run.heads, read, batch)
            total, extra = total + 0.5 * difference, {"difference": float(difference.detach())}
        if tower > 0 and batch.told is not None:
            total = total + 0.15 * run.heads(features, batch.told)[0]
        right = {f"{task} {batch.path}": share for task, share in judged(logits.detach(), batch.rows, batch.tasks).items()}
        return total, {
            "loss": float(total.detach()),
            "answers": float(answers.detach()),
            "texts": float(texts.detach()),
            **extra,
            **right,
        }

    vision = run.model.vision
    spotting = [*run.heads.differs.parameters(), *run.heads.marks.parameters()]
    language = dict(run.model.language.named_parameters())
    rest = [parameter for name, parameter in language.items() if not name.endswith(SHARPNESS)]
    sharp = [parameter for name, parameter in language.items() if name.endswith(SHARPNESS)]
    groups: list[dict[str, Any]] = [
        {"params": [*rest, *vision.mlp1.parameters(), *vision.mlp2.parameters(), *spotting]},
        {"params": sharp, "share": 10.0, "weight_decay": 0.0},
    ]
    if tower > 0:
        heads = [p for n, p in run.heads.named_parameters() if not n.startswith(("differs", "marks"))]
        groups.append({"params": [*vision.vision_model.parameters(), *heads], "share": tower})
    run.stage(stage, partial(make, words=run.words), step, groups)
    attentions.close()


def learn_consistency(run: Run, stage: Stage, style: Style, budget: int) -> None:
    attentions = Looking(run.model, looking.RECOUNTS)
    step = vico.consistency(run.model, attentions)
    make = partial(batches.talk, words=run.words, style=style, budget=budget)
    run.stage(stage, make, step, [{"params": [*run.model.language.parameters(), *run.model.vision.mlp2.parameters()]}])
    attentions.close()


SEVERAL = tuple(size for size in scenes.TILES if size > 1)
PART = 20  # batches to a file


def _gather(run: Run, stage: Stage, make: Any, one: Callable[[batches.Talk, int], Any]) -> None:
    """`one(batch, number)` of each batch, kept in files of the run's folder: those that are there are done."""
    files = [run.folder / f"{stage.name}-{part:04}.pt" for part in range(stage.steps // PART)]
    first = PART * sum(file.exists() for file in files)
    data = batches.loaded(batches.Batches(make, run.seed, stage.name, first, stage.steps), run.workers)
    began = time.monotonic()
    for file in files[first // PART :]:
        found = [one(batches.moved(next(data), run.device), number) for number in range(first, first + PART)]
        first += PART
        _replace(file, _joined(found))
        run.tell(stage, first, {}, 0, (time.monotonic() - began) / PART)
        began = time.monotonic()
    run.done[stage.name] = first


def _found(run: Run, stage: str) -> Any:
    return _joined([torch.load(file, weights_only=False) for file in sorted(run.folder.glob(f"{stage}-*.pt"))])


def _joined(parts: list[Any]) -> Any:
    """One of several dataclasses of tensors."""
    return type(parts[0])(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(parts[0])))


def gather_answers(run: Run, stage: Stage, make: Callable[..., batches.Talk]) -> None:
    _gather(run, stage, partial(make, words=run.words), lambda batch, _: settling.gathered(run.model, batch))


def settle_answers(run: Run, stage: Stage, count: int) -> None:
    found = _found(run, "gathering")
    parameters, step = settling.settle(run.model, found)
    run.stage(stage, partial(vico.some, count=count, of=len(found.told)), step, [{"params": parameters}])


def judge_tiles(run: Run, stage: Stage, style: Style, budget: int) -> None:
    """What the short path costs tile by tile."""
    make = partial(batches.talk, words=run.words, style=style, budget=budget, sizes=SEVERAL, pairs=0, labelled=False)
    _gather(run, stage, make, lambda batch, n: vico.cost_of_short(run.model, batch, np.random.default_rng([run.seed, n])))


def learn_routes(run: Run, stage: Stage, share: float) -> None:
    judged = _found(run, "judging")
    step = vico.router(run.model, judged, share)
    parameters = [*run.model.vision.pooling_before_gating.parameters(), *run.model.vision.gating.parameters()]
    run.stage(stage, partial(vico.some, count=48, of=len(judged.ratios)), step, [{"params": parameters}])


STAGES = (
    Stage("dense", 1100, 2.5e-3),
    Stage("questions", 5000, 4e-4),
    Stage("together", 1500, 3e-4),
    Stage("large", 200, 4e-4),
    Stage("tiles", 1100, 3e-4),
    Stage("full", 200, 3e-4),
    Stage("mixed", 1500, 3e-4),
    Stage("drill", 1500, 4e-4),
    Stage("alone", 1500, 4e-4),
    Stage("many", 450, 4e-4),
    Stage("whole", 800, 4e-4),
    Stage("compare", 1200, 3e-4),
    Stage("sight", 1500, 2.5e-4),
    Stage("across", 1600, 3e-4),
    Stage("polish", 420, 1e-4),
    Stage("precision", 1000, 2e-4),
    Stage("recount", 1000, 2.5e-4),
    Stage("refine", 700, 1.2e-4),
    Stage("consistency", 150, 6e-5),
    Stage("gathering", 400, 0),
    Stage("settling", 150, 2e-4),
    Stage("judging", 360, 0),
    Stage("router", 200, 5e-4),
)


def as_served(budget: int, alone: int, **rest: Any) -> Callable[..., batches.Talk]:
    """Pictures as they are served with so many tiles to a batch, now and then of one tile each."""
    return partial(batches.either, often=(WHOLE, budget), now_and_then=(replace(WHOLE, max_tiles=1), alone), **rest)


SIGHT = partial(learn_answers, make=as_served(12, 12, share=0.6, extras=0.3, pairs=0.25, near=0.06))
PRECISION = as_served(14, 18, share=0.6, extras=0.2, pairs=0.15, near=0.06)
TEACH = {
    "dense": partial(learn_patches, styles=(CROWDED, CROWDED, CROWDED, SMALL), count=32, lean=0.5),
    "questions": partial(learn_answers, make=partial(batches.talk, style=SINGLE, budget=12, extras=0.2), tower=0),
    "together": partial(learn_answers, make=partial(batches.talk, style=SINGLE, budget=24, extras=0.3, pairs=0.3), tower=0.4),
    "large": partial(learn_patches, styles=(LARGE, Style(), Style()), count=7, lean=0.1),
    "tiles": partial(learn_answers, make=partial(batches.talk, style=SMALL, budget=28, extras=0.5, pairs=0.25), tower=0.4),
    "full": partial(learn_answers, make=partial(batches.talk, style=Style(), budget=10, extras=0.5), tower=0.3),
    "mixed": partial(
        learn_answers, make=partial(batches.either, often=(SMALL, 28), now_and_then=(Style(), 10), extras=0.5), tower=0.3
    ),
    "drill": partial(
        learn_answers, make=partial(batches.either, often=(DRILL, 56), now_and_then=(WHOLE, 14), extras=0.4), tower=0
    ),
    "alone": partial(
        learn_answers,
        make=partial(batches.either, often=(ALONE, 32), now_and_then=(replace(ALONE, drill=False), 32), extras=0.3),
        tower=0.4,
    ),
    "many": partial(
        learn_answers, make=partial(batches.either, often=(DRILL, 40), now_and_then=(WHOLE, 12), extras=0.3), tower=0.2
    ),
    "whole": partial(learn_answers, make=as_served(16, 12, extras=0.3), tower=0),
    "compare": partial(
        learn_answers,
        make=partial(
            batches.either, often=(DRILL, 40), now_and_then=(WHOLE, 14), sizes=SEVERAL, extras=0.3, pairs=0.6, near=0.2
        ),
        tower=0,
    ),
    "sight": partial(SIGHT, tower=0.6),
    "across": partial(learn_answers, make=as_served(16, 16, share=0.8, extras=0.3, pairs=0.2), tower=0),
    "polish": partial(SIGHT, tower=0.4),
    "precision": partial(learn_answers, make=PRECISION, tower=0.3),
    "recount": partial(learn_answers, make=PRECISION, tower=0.3, recount=True),
    "refine": partial(
        learn_answers, make=as_served(14, 18, share=0.6, extras=0.15, pairs=0.08, near=0.06), tower=0.3, recount=True
    ),
    "consistency": partial(learn_consistency, style=WHOLE, budget=12),
    "gathering": partial(gather_answers, make=PRECISION),
    "settling": partial(settle_answers, count=4096),
    "judging": partial(judge_tiles, style=WHOLE, budget=7),
    "router": partial(learn_routes, share=0.65),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("demo/run"), help="folder of the run (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo/checkpoint"), help="where to write it (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=35)
    parser.add_argument("--workers", type=int, default=2, help="processes that draw (default: %(default)s)")
    arguments = parser.parse_args()
    run = Run(arguments.run, arguments.seed, arguments.workers)
    for stage in STAGES:
        if run.done.get(stage.name, 0) < stage.steps:
            TEACH[stage.name](run, stage)
        run.model.zero_grad(set_to_none=True)
    model.write(run.model, run.words, arguments.out, RELATIVE, ABSOLUTE)
    print(f"{arguments.out} written, {run.seconds / 3600:.1f} hours of training")


if __name__ == "__main__":
    main()

"""Where the language model should look for an answer: it learns to count and to spell far sooner if its attentions are told."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from demo import batches, model
from demo.scenes import PATCH

Heads = tuple[tuple[int, int], ...]
COUNTS, READS = ((1, 2), (2, 3)), ((3, 0), (3, 1))
"""Layer and head of the attentions that learn where to look for how many there are, and for the next digit."""
RECOUNTS = (*COUNTS, (2, 0), (2, 1), (3, 2), (3, 3))
"""With four that did hardly anything. Each errs by a fifth at each shape, and those of two agree by half only."""
NONE = 2.0
"""Shapes that the first token counts for: what it gets of an attention says how many there are beside it."""


def shapes(told: batches.Patches) -> Tensor:
    """1 where a shape is, by its kind, [tiles, 6, patches]."""
    known = (told.kind >= 1) & (told.kind <= 6)
    return F.one_hot(torch.where(known, told.kind, 0), 7)[..., 1:].mT.float()


def middles(told: batches.Patches) -> Tensor:
    """1 at the patch in a shape's middle, [tiles, 6, patches], in tiles that show the whole picture."""
    return shapes(told) * ((told.middle == 1) & (told.place >= 0))[:, None]


def turns(told: batches.Patches) -> Tensor:
    """1 where a digit is, by its place in its number, [tiles, 4, patches]."""
    return F.one_hot(told.turn + 1, 5)[..., 1:].mT.float()


def by_token(maps: Tensor, compressed: Tensor) -> Tensor:
    """Sums of `maps` [images · tiles, n, patches], whole numbers, over each visual token's patches, [images, n, tokens].

    `compressed` bool [images, tiles].
    """
    images, tiles = compressed.shape
    side = round(maps.shape[-1] ** 0.5)
    found = []
    for tile, short in zip(maps.view(*maps.shape[:2], side, side), compressed.flatten().tolist(), strict=True):
        span = 4 if short else 2
        found.append((F.avg_pool2d(tile, span) * span**2).round().flatten(1))
    return torch.stack([torch.cat(found[i * tiles : (i + 1) * tiles], dim=1) for i in range(images)])


@dataclass
class Wanted:
    """From where is looked, a prefix and a row, and at what: `sets` [tokens of the prefix], −1 for none, and their shares."""

    prefix: int
    row: int
    sets: Tensor
    shares: Tensor


def counting(batch: batches.Talk, told: batches.Patches) -> Iterator[Wanted]:
    """Each shape of the kind that is asked for has the same share, whichever of its tokens get it.

    Of the tile that shows the whole picture; what is too thin to be told there is left out. An image a prefix.
    """
    counted, covered = by_token(middles(told), batch.compressed), by_token(shapes(told), batch.compressed)
    for number, (task, (kind, many)) in enumerate(zip(batch.tasks, batch.sought, strict=True)):
        if task != "count":
            continue
        prefix, row = _spoken(batch, number)[0]
        side = batch.tiles.shape[1] // PATCH // (4 if batch.compressed[prefix, -1] else 2)
        here, area = (maps[prefix, kind - 1, -side * side :] for maps in (counted, covered))
        if int(here.sum()) == many:
            before = len(batch.opening) + counted.shape[-1] - side * side
            sets = F.pad(_nearest(here, area > 0, side), (before, len(batch.end)), value=-1)
            sets[0] = 0
            yield Wanted(prefix, row, sets, torch.cat([here.new_tensor([NONE]), here[here > 0]]) / (NONE + many))


def _nearest(here: Tensor, area: Tensor, side: int) -> Tensor:
    """Of each token of a tile the nearest of those with a middle, from 1, where the kind covers it; elsewhere −1."""
    found = torch.full_like(here, -1, dtype=torch.long)
    at, mine = here.nonzero().flatten(), (area | (here > 0)).nonzero().flatten()
    if len(at):
        down, across = mine[:, None] // side - at // side, mine[:, None] % side - at % side
        found[mine] = 1 + (down**2 + across**2).argmin(1)
    return found


def reading(batch: batches.Talk, told: batches.Patches) -> Iterator[Wanted]:
    """The digits of a turn together, in whatever tile."""
    digits = by_token(turns(told), batch.compressed)
    for number, task in enumerate(batch.tasks):
        if task != "number":
            continue
        for turn, (prefix, row) in enumerate(_spoken(batch, number)[:-1]):
            here = F.pad(digits[prefix, turn], (len(batch.opening), len(batch.end))) > 0
            if bool(here.any()):
                yield Wanted(prefix, row, here.long() - 1, torch.ones(1, device=here.device))


def _spoken(batch: batches.Talk, number: int) -> list[tuple[int, int]]:
    """Prefix and row of each token after which a conversation's answer goes on."""
    at = ((batch.rows.numbers == number) & (batch.rows.answers >= 0)).nonzero()
    return [(int(prefix), int(row)) for prefix, row in at]


Wants = Callable[[batches.Talk, batches.Patches], Iterator[Wanted]]


class Looking:
    """What the language model's attentions look at while it answers, and what they should."""

    def __init__(self, trainee: model.Trainee, counts: Heads = COUNTS, stress: float = 0.5) -> None:
        """`counts`: which of them count; `stress`: what each of them, and each that reads, weighs in the loss."""
        self._language, self._stress = trainee.language.model, stress
        self._looks: tuple[tuple[str, Heads, Wants], ...] = (("counts", counts, counting), ("digits", READS, reading))
        self._queries: dict[int, Tensor] = {}
        self._hooks = [
            layer.self_attn.q_norm.register_forward_hook(partial(_keep, self._queries, i))
            for i, layer in enumerate(self._language.layers)
        ]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def loss(self, read: model.Read, batch: batches.Talk) -> tuple[Tensor, dict[str, float]]:
        """Cross entropy, right after `batch.rows` were answered, and the share that went where it should.

        Counting looks at the shapes in the tile that shows the whole picture, and at the first token; the next digit is
        looked for where digits of its turn are. 0 for two images to a prefix, and without labels.
        """
        total, shown, told = read.hidden.sum() * 0, dict[str, float](), batch.told_apart
        if told is None:
            return total, shown
        for name, heads, wants in self._looks:
            those = [*wants(batch, told)]
            if not those:
                continue
            at = torch.tensor([(one.prefix, one.row) for one in those], device=read.hidden.device)
            weights = at.new_tensor([len(one.shares) for one in those])  # most that is counted is none or one
            for layer, head in heads:
                seen = self._attention(read, batch.rows, layer, head, at)
                each = torch.stack([_lost(logs, one) for logs, one in zip(seen, those, strict=True)])
                lost = (each * weights).sum() / weights.sum()
                total = total + self._stress * lost
                shown[f"finds {name} {layer}.{head}"] = float((-lost.detach()).exp())
        return total, shown

    def _attention(self, read: model.Read, rows: batches.Rows, layer: int, head: int, at: Tensor) -> Tensor:
        """Logarithms of what each token gets, [n, prefix and rows], from `at` [n, 2]: a prefix and a row."""
        prefix, row = at.unbind(-1)
        places = (read.length + rows.places[prefix, row])[None]
        query = self._queries[layer][prefix, row, head]
        cosine, sine = self._language.rotary_emb(query.float()[None], places)
        query = apply_rotary_pos_emb(query[None, None].float(), query[None, None].float(), cosine, sine)[0][0, 0]
        keys = read.cache.layers[layer].keys[:, head * model.KV_HEADS // model.LANGUAGE_HEADS].float()
        logits = torch.einsum("nd,ntd->nt", query, keys[prefix]) / model.HEAD_DIM**0.5
        logits = logits.masked_fill(~model.alone(rows, read.length)[prefix, row], -math.inf)
        return cast(Tensor, logits.log_softmax(-1))


def _lost(logs: Tensor, wanted: Wanted) -> Tensor:
    """Divergence of what the sets got from their shares."""
    chosen = (wanted.sets >= 0).nonzero().flatten()
    got = torch.zeros_like(wanted.shares).index_add(0, wanted.sets[chosen], logs[chosen].exp())
    return (wanted.shares * (wanted.shares.log() - got.clamp_min(1e-9).log())).sum()


def _keep(seen: dict[int, Tensor], layer: int, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
    seen[layer] = output

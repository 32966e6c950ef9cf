"""Batches that several tests share."""

import numpy as np

from demo.batches.conversations import conversation_batch
from demo.batches.types import ConversationBatch, PatchTargets
from demo.model.demo_model import DemoModel, EncodedPrefix
from demo.scenes.style import Style
from demo.text.tokenizer import DemoTokenizer

HARD_STYLE = Style(tile_pixels=224, min_digit_pixels=28, hard=True)


def hard_batch(
    tokenizer: DemoTokenizer, seed: int, compressed: bool = False, tile_counts: tuple[int, ...] = (2, 4)
) -> ConversationBatch:
    """A batch of single images, all tiles on one path."""
    rng = np.random.default_rng(seed)
    batch = conversation_batch(rng, tokenizer, HARD_STYLE, 6, tile_counts, pair_share=0, extra_questions=0)
    batch.compressed.fill_(compressed)
    return batch


def patch_targets(batch: ConversationBatch) -> PatchTargets:
    assert batch.targets is not None
    return batch.targets


def encode(model: DemoModel, batch: ConversationBatch) -> EncodedPrefix:
    features = model.forward(batch.tiles, batch.crop_origins)
    return model.encode_prefixes(model.build_prefixes(batch, features, batch.compressed))

"""Supervision of attention heads: they are trained to attend to what a question is about.

With it the language model learns to count and to read numbers far sooner.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from demo.batches.types import ConversationBatch, ConversationRows, PatchTargets
from demo.model.config import LANGUAGE_HEAD_WIDTH, LANGUAGE_HEADS, LANGUAGE_KV_HEADS
from demo.model.demo_model import DemoModel, EncodedPrefix, conversation_mask
from demo.training.attention_targets import AttentionTarget, counting_targets, reading_targets

Heads = tuple[tuple[int, int], ...]
"""Layer and index of attention heads."""
COUNTING_HEADS: Heads = ((1, 2), (2, 3))
READING_HEADS: Heads = ((3, 0), (3, 1))
MORE_COUNTING_HEADS: Heads = (*COUNTING_HEADS, (2, 0), (2, 1), (3, 2), (3, 3))
"""With four heads that had hardly any effect before. A head errs by a fifth per shape; two heads' errors correlate by half."""

_Targets = Callable[[ConversationBatch, PatchTargets], Iterator[AttentionTarget]]


class AttentionSupervision:
    """Compares the attention of some heads of the language model with its targets.

    A context manager: outside of it the model's queries are not recorded.
    """

    def __init__(self, model: DemoModel, counting_heads: Heads = COUNTING_HEADS, weight: float = 0.5) -> None:
        """Choose the heads.

        Args:
            model: The model.
            counting_heads: Heads that count.
            weight: Weight of each head in the loss, the reading heads included.
        """
        self._language, self._weight = model.language.model, weight
        self._supervised: tuple[tuple[str, Heads, _Targets], ...] = (
            ("counting", counting_heads, counting_targets),
            ("reading", READING_HEADS, reading_targets),
        )
        self._queries: dict[int, Tensor] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        self._hooks = [
            layer.self_attn.q_norm.register_forward_hook(partial(_store_queries, self._queries, i))
            for i, layer in enumerate(self._language.layers)
        ]
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def loss(self, prefix: EncodedPrefix, batch: ConversationBatch) -> tuple[Tensor, dict[str, float]]:
        """Return the divergence of the attention from its targets, and figures for the log.

        Call it right after `DemoModel.answer_logits(prefix, batch.rows)`. The loss is 0 for two images per prefix and
        for batches without labels.
        """
        total, figures, targets = prefix.hidden.sum() * 0, dict[str, float](), batch.single_image_targets
        if targets is None:
            return total, figures
        for name, heads, make_targets in self._supervised:
            wanted = [*make_targets(batch, targets)]
            if not wanted:
                continue
            queries = torch.tensor([(target.prefix, target.row) for target in wanted], device=prefix.hidden.device)
            weights = queries.new_tensor([len(target.shares) for target in wanted])  # most counts are 0 or 1
            for layer, head in heads:
                log_attention = self._log_attention(prefix, batch.rows, layer, head, queries)
                divergences = [_divergence(logs, target) for logs, target in zip(log_attention, wanted, strict=True)]
                mean = (torch.stack(divergences) * weights).sum() / weights.sum()
                total = total + self._weight * mean
                figures[f"{name} attention {layer}.{head}"] = float((-mean.detach()).exp())
        return total, figures

    def _log_attention(self, prefix: EncodedPrefix, rows: ConversationRows, layer: int, head: int, queries: Tensor) -> Tensor:
        """Return the logarithm of one head's attention to each token, [n, prefix and row tokens].

        `queries`: index of prefix and row of each query, [n, 2].
        """
        prefix_index, row = queries.unbind(-1)
        positions = (prefix.length + rows.positions[prefix_index, row])[None]
        query = self._queries[layer][prefix_index, row, head]
        cosine, sine = self._language.rotary_emb(query.float()[None], positions)
        query = apply_rotary_pos_emb(query[None, None].float(), query[None, None].float(), cosine, sine)[0][0, 0]
        keys = prefix.cache.layers[layer].keys[:, head * LANGUAGE_KV_HEADS // LANGUAGE_HEADS].float()
        logits = torch.einsum("nd,ntd->nt", query, keys[prefix_index]) / LANGUAGE_HEAD_WIDTH**0.5
        logits = logits.masked_fill(~conversation_mask(rows, prefix.length)[prefix_index, row], -math.inf)
        return cast(Tensor, logits.log_softmax(-1))


def _divergence(log_attention: Tensor, target: AttentionTarget) -> Tensor:
    """KL divergence of the attention that each set gets from its target share."""
    chosen = (target.sets >= 0).nonzero().flatten()
    actual = torch.zeros_like(target.shares).index_add(0, target.sets[chosen], log_attention[chosen].exp())
    return (target.shares * (target.shares.log() - actual.clamp_min(1e-9).log())).sum()


def _store_queries(queries: dict[int, Tensor], layer: int, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
    queries[layer] = output

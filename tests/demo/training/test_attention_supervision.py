import dataclasses
import math
from typing import Any

import pytest
import torch

from demo.model.demo_model import DemoModel
from demo.text.tokenizer import DemoTokenizer
from demo.training import attention_supervision
from demo.training.attention_supervision import COUNTING_HEADS, MORE_COUNTING_HEADS, AttentionSupervision, _divergence
from demo.training.attention_targets import AttentionTarget, counting_targets
from tests.demo.training.samples import encode, hard_batch, patch_targets


@pytest.mark.parametrize("seed", range(3))
def test_attention_equals_that_of_the_language_model(model: DemoModel, tokenizer: DemoTokenizer, seed: int) -> None:
    batch = hard_batch(tokenizer, seed, compressed=True)
    prefixes = model.build_prefixes(batch, model.forward(batch.tiles, batch.crop_origins), batch.compressed)
    with AttentionSupervision(model) as attention:
        encoded = model.encode_prefixes(prefixes)
        model.answer_logits(encoded, batch.rows)
        last = int(batch.rows.conversations.max())
        own = batch.rows.conversations[-1] == last
        queries = torch.tensor([[len(prefixes) - 1, int(own.nonzero()[-1])]])
        actual = {
            (layer, head): attention._log_attention(encoded, batch.rows, layer, head, queries)[0].exp()
            for layer, head in COUNTING_HEADS
        }
    model.language.set_attn_implementation("eager")
    embeddings = torch.cat([prefixes[-1], model.embed(batch.rows.ids[-1][own])])[None]
    expected = model.language.model(inputs_embeds=embeddings, output_attentions=True).attentions
    model.language.set_attn_implementation("sdpa")
    length = prefixes.shape[1]
    for (layer, head), shares in actual.items():
        assert torch.allclose(shares[:length], expected[layer][0, head, -1, :length], atol=1e-5)
        assert torch.allclose(shares.sum(), torch.tensor(1.0))


def test_attention_at_its_target_has_no_loss() -> None:
    target = AttentionTarget(0, 0, torch.tensor([0, -1, 1, 1, 2]), torch.tensor([0.5, 0.25, 0.25]))
    at_target = torch.tensor([0.5, 1e-9, 0.2, 0.05, 0.25]).log()
    assert abs(float(_divergence(at_target, target))) < 1e-6
    half = torch.tensor([0.25, 0.5, 0.1, 0.025, 0.125]).log()
    assert float(_divergence(half, target)) == pytest.approx(0.693, abs=1e-3)


def test_counting_queries_weigh_by_their_number_of_shapes(
    model: DemoModel, tokenizer: DemoTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = hard_batch(tokenizer, 1)
    monkeypatch.setattr(attention_supervision, "reading_targets", lambda *_: iter(()))
    with AttentionSupervision(model) as attention:
        encoded = encode(model, batch)
        model.answer_logits(encoded, batch.rows)
        monkeypatch.setattr(attention_supervision, "_divergence", lambda _, target: torch.tensor(float(len(target.shares) > 2)))
        sizes = [len(target.shares) for target in counting_targets(batch, patch_targets(batch))]
        assert min(sizes) <= 2 < max(sizes)
        loss, _ = attention.loss(encoded, batch)
    assert float(loss) == pytest.approx(sum(size for size in sizes if size > 2) / sum(sizes))


def test_every_counting_head_is_in_the_loss_with_equal_weight(model: DemoModel, tokenizer: DemoTokenizer) -> None:
    batch = hard_batch(tokenizer, 1)

    def loss(**options: Any) -> tuple[float, dict[str, float]]:
        with AttentionSupervision(model, **options) as attention:
            encoded = encode(model, batch)
            model.answer_logits(encoded, batch.rows)
            value, figures = attention.loss(encoded, batch)
        return float(value), figures

    two_heads, two_figures = loss()
    six_heads, six_figures = loss(counting_heads=MORE_COUNTING_HEADS)
    added = six_figures.keys() - two_figures.keys()
    assert added == {f"counting attention {head}" for head in ("2.0", "2.1", "3.2", "3.3")}
    added_loss = sum(-math.log(six_figures[name]) for name in added)
    assert six_heads - two_heads == pytest.approx(0.5 * added_loss, rel=1e-3)
    assert loss(weight=1.0)[0] == pytest.approx(2 * two_heads, rel=1e-5)


def test_batches_without_labels_and_pairs_have_no_loss(model: DemoModel, tokenizer: DemoTokenizer) -> None:
    batch = hard_batch(tokenizer, 1)
    with AttentionSupervision(model) as attention:
        encoded = encode(model, batch)
        for unlabelled in (dataclasses.replace(batch, targets=None), dataclasses.replace(batch, images_per_prefix=2)):
            loss, figures = attention.loss(encoded, unlabelled)
            assert (float(loss), figures) == (0.0, {})


def test_hooks_are_removed_on_exit(model: DemoModel) -> None:
    norms = [layer.self_attn.q_norm for layer in model.language.model.layers]
    with AttentionSupervision(model):
        assert all(norm._forward_hooks for norm in norms)
    assert not any(norm._forward_hooks for norm in norms)

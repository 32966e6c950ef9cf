import pytest

from demo.model.demo_model import DemoModel
from demo.text.tokenizer import DemoTokenizer
from demo.training.attention_supervision import AttentionSupervision
from demo.training.consistency import consistency_step
from tests.demo.training.samples import hard_batch


def test_loss_has_divergence_from_the_long_path_and_attention(model: DemoModel, tokenizer: DemoTokenizer) -> None:
    with AttentionSupervision(model) as attention:
        step = consistency_step(model, attention)
        batch = hard_batch(tokenizer, 1, tile_counts=(2,))
        total, figures = step(batch)
        assert figures["divergence long"] == pytest.approx(0, abs=1e-5), "same weights, same path"
        assert 0 < figures["counting attention 1.2"] < 1
        assert float(total.detach()) > 0.3 * figures["answers long"] + 0.1, "the attention of random weights has a loss"
        batch.compressed.fill_(True)
        assert step(batch)[1]["divergence short"] > 1e-4

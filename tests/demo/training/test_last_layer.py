import copy

import pytest
import torch
import torch.nn.functional as F

from demo.batches.types import ConversationBatch
from demo.model.demo_model import DemoModel
from demo.text.tokenizer import DemoTokenizer
from demo.training.last_layer import last_layer_inputs, last_layer_step
from tests.demo.training.samples import hard_batch


@pytest.fixture
def batch(tokenizer: DemoTokenizer) -> ConversationBatch:
    batch = hard_batch(tokenizer, 1, compressed=True, tile_counts=(2,))
    assert "count" in batch.tasks
    assert set(batch.tasks) != {"count"}
    return batch


def test_collected_inputs_give_the_loss_of_both_paths(model: DemoModel, batch: ConversationBatch) -> None:
    inputs = last_layer_inputs(model, batch)
    with torch.no_grad():
        loss, _ = last_layer_step(model, inputs)[1](torch.arange(len(inputs.answer_ids)))
        features = model.forward(batch.tiles, batch.crop_origins)
        prefixes = [
            model.build_prefixes(batch, features, compressed)
            for compressed in (batch.compressed, torch.zeros_like(batch.compressed))
        ]
        logits = [model.answer_logits(model.encode_prefixes(prefix), batch.rows) for prefix in prefixes]
    is_count = [batch.tasks[n] == "count" for n in batch.rows.conversations[batch.rows.labels >= 0]]
    assert inputs.weights.tolist() == 2 * [3.0 if count else 1.0 for count in is_count]
    losses = F.cross_entropy(torch.cat(logits), batch.rows.answer_ids.repeat(2), reduction="none")
    assert float(loss) == pytest.approx(float((losses * inputs.weights).sum() / inputs.weights.sum()), rel=1e-3)


def test_training_lowers_the_loss_and_changes_the_last_layer_only(model: DemoModel, batch: ConversationBatch) -> None:
    trained = copy.deepcopy(model).requires_grad_(True)
    inputs = last_layer_inputs(trained, batch)
    parameters, step = last_layer_step(trained, inputs)
    optimiser = torch.optim.AdamW(parameters, lr=1e-3)
    losses = []
    for _ in range(30):
        loss, _ = step(torch.arange(len(inputs.answer_ids)))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    before, after = model.state_dict(), trained.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    last = f"language.model.layers.{len(trained.language.model.layers) - 1}."
    modules = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm")
    assert changed == {"language.model.norm.weight", *(f"{last}{module}.weight" for module in modules)}

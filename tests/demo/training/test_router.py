import torch

from demo.model.config import VISION_WIDTH
from demo.model.demo_model import DemoModel
from demo.text.tokenizer import DemoTokenizer
from demo.training.router import TileCosts, router_step


def synthetic_costs(count: int, seed: int) -> tuple[TileCosts, torch.Tensor]:
    """Costs of tiles, and which of them have content. Compressing those doubles the loss; other costs are noise."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 16, VISION_WIDTH, generator=generator) * 0.3
    has_content = torch.rand(count, generator=generator) < 0.2
    features[has_content, 5, :20] += 3.0
    noise = 1 + 0.02 * torch.randn(count, generator=generator)
    return TileCosts(features.half(), torch.where(has_content, 2 * noise, noise)), has_content


def test_router_keeps_costly_tiles_that_it_was_not_trained_on(tokenizer: DemoTokenizer) -> None:
    torch.manual_seed(0)
    model = DemoModel(tokenizer)
    step = router_step(model, synthetic_costs(150, 1)[0], compressed_share=0.5)
    parameters = [*model.vision.pooling_before_gating.parameters(), *model.vision.gating.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=5e-4)
    for index in range(60):
        loss, _ = step(torch.arange(48) * (index + 1) % 150)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    costs, has_content = synthetic_costs(60, 2)
    with torch.no_grad():
        features = costs.features.float()
        keep = model.vision.gating(model.vision.pooling_before_gating(features)).softmax(-1)[:, 1]
    assert keep[has_content].min() > keep[~has_content].max()
    assert keep[~has_content].mean() < 0.5 < keep[has_content].mean()

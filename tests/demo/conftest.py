import pytest
import torch

from demo.model.demo_model import DemoModel
from demo.text.tokenizer import DemoTokenizer


@pytest.fixture(scope="session")
def tokenizer() -> DemoTokenizer:
    return DemoTokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: DemoTokenizer) -> DemoModel:
    """An untrained model."""
    torch.manual_seed(0)
    return DemoModel(tokenizer).requires_grad_(False)

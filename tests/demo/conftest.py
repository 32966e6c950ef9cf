import pytest
import torch

from demo import model
from demo.words import Words


@pytest.fixture(scope="session")
def words() -> Words:
    return Words()


@pytest.fixture(scope="module")
def trainee(words: Words) -> model.Trainee:
    """Untrained."""
    torch.manual_seed(0)
    return model.Trainee(words).requires_grad_(False)

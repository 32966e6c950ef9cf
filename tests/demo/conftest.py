import pytest

from demo.words import Words


@pytest.fixture(scope="session")
def words() -> Words:
    return Words()

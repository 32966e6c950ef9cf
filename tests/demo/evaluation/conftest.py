from collections.abc import Iterator

import pytest

from demo.evaluation import client
from tests.demo.evaluation.fake_gateway import FakeGateway


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGateway]:
    monkeypatch.setattr(client, "RETRY_DELAYS_SECONDS", (0.01, 0.01))
    monkeypatch.setattr(client, "BUSY_DELAY_SECONDS", 0.01)
    with FakeGateway(lambda _: "yes") as fake:
        yield fake

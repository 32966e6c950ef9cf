"""Descriptors for connections."""

import pytest

from common.descriptors import connection_limit


def test_half_of_the_descriptors_are_for_other_purposes(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(256, 1024)]
    monkeypatch.setattr("resource.getrlimit", lambda _: limits[-1])
    monkeypatch.setattr("resource.setrlimit", lambda _, new: limits.append(new))
    assert connection_limit(100) == 100
    assert limits == [(256, 1024)], "it is enough"
    assert connection_limit(300) == 300
    assert limits[-1] == (600, 1024)
    assert connection_limit(4096) == 512
    assert limits[-1] == (1024, 1024)

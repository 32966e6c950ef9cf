"""When the engine core is forked. That it works is tested with an engine, in `test_main.py`."""

import pytest
from vllm.platforms import current_platform

from lm_worker import engine


@pytest.mark.parametrize("is_cpu", [True, False])
def test_the_engine_core_is_forked_on_a_cpu_only(monkeypatch: pytest.MonkeyPatch, is_cpu: bool) -> None:
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _self: is_cpu)
    assert engine.may_fork() is is_cpu


def test_a_start_method_in_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    assert not engine.may_fork()

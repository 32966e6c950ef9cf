"""How a language worker's own arguments and vLLM's flags share a command line."""

import pytest

from common.options import ConfigError
from lm_worker.config import reject_own_flags, split_arguments


@pytest.mark.parametrize(
    ("arguments", "own", "vllm_flags"),
    [
        (["MODEL"], ["MODEL"], []),
        (["MODEL", "--"], ["MODEL"], []),
        (["MODEL", "--", "--dtype=float32", "--"], ["MODEL"], ["--dtype=float32", "--"]),
    ],
)
def test_arguments_after_the_first_double_dash_are_flags_of_vllm(
    arguments: list[str], own: list[str], vllm_flags: list[str]
) -> None:
    assert split_arguments(arguments) == (own, vllm_flags)


@pytest.mark.parametrize("flag", ["--port", "--port=1", "--limit_mm_per_prompt={}", "--uds=/s"])
def test_flags_that_the_worker_sets_itself_are_rejected(flag: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{flag.split('=')[0]} after -- is set by the language worker itself"):
        reject_own_flags(["--dtype=float32", flag])


def test_other_flags_of_vllm_are_accepted() -> None:
    reject_own_flags(["--dtype=float32", "--max-model-len", "4096"])

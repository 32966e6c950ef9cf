"""The list of vLLM's flags that is checked in is that of the pinned vLLM."""

import pytest

from common.options import ConfigError, read_options
from lm_worker import vllm_flags
from lm_worker.config import LanguageOptions
from lm_worker.vllm_arguments import vllm_arguments
from tests.e2e.serving import GOLDEN
from tests.lm_worker.vllm_flags import flags_of_vllm

CHECKPOINT = GOLDEN / "flash-qwen3/checkpoint"


def test_the_list_is_that_of_the_pinned_vllm() -> None:
    """Where it fails: python -m tests.lm_worker.vllm_flags > lm_worker/vllm_flags.txt."""
    assert vllm_flags._FILE.read_text() == flags_of_vllm()


def test_a_wrong_value_is_one_line() -> None:
    options = read_options(LanguageOptions, [str(CHECKPOINT)], {})
    with pytest.raises(ConfigError, match="^vLLM's flags: argument --max-model-len: .*'many'") as caught:
        vllm_arguments(options, CHECKPOINT, CHECKPOINT, ["--max-model-len=many"])
    assert "\n" not in str(caught.value)

"""Defaults that a language worker sets for vLLM, and what of the caller's flags replaces them."""

from argparse import Namespace
from pathlib import Path

import pytest

from lm_worker.config import LanguageOptions
from lm_worker.vllm_arguments import vllm_arguments
from tests.e2e.serving import ROOT


def parse(*flags: str) -> Namespace:
    checkpoint = ROOT / "demo/checkpoint"
    return vllm_arguments(LanguageOptions(model=checkpoint), checkpoint, Path("/dev/shm/none"), flags)


def test_json_has_no_white_space_by_default() -> None:
    """A small model would otherwise generate white space up to the limit, which every JSON schema allows."""
    config = parse().structured_outputs_config
    assert (config.backend, config.disable_any_whitespace) == ("xgrammar", True)


@pytest.mark.parametrize(
    "flags",
    [
        ("--structured-outputs-config", '{"backend": "outlines"}'),
        ('--structured-outputs-config={"backend": "outlines"}',),
        ("--structured-outputs-config.backend=outlines",),
        ("--structured_outputs_config.backend", "outlines"),
    ],
)
def test_the_callers_configuration_of_structured_output_replaces_it(flags: tuple[str, ...]) -> None:
    """Also where the default alone would not be valid: outlines rejects it."""
    config = parse(*flags).structured_outputs_config
    assert (config.backend, config.disable_any_whitespace) == ("outlines", False)

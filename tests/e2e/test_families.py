"""Every language model that a family uses boots and answers an image, decoupled; what cannot run here says so by name."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests import checkpoints
from tests.e2e.serving import EXACT, Served, image_part, start_up, stop, wait_ready


@dataclass(frozen=True)
class Family:
    """One checkpoint to make and serve."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


FAMILIES = [
    Family("qwen3-moe", {"language": "qwen3_moe", "flash": True}),
    Family("internlm2", {"language": "internlm2", "tower": "6b", "pixel_shuffle": "v1", "chat_template": "text"}),
    Family("phi3", {"language": "phi3", "select_layer": -2, "chat_template": "text"}),
    Family("gpt-oss", {"language": "gpt_oss"}),
    Family("native"),
]
"""Qwen2, Qwen3 and Llama are the golden checkpoints."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Served]]:
    """All of them at once: a start is mostly one thread's imports."""
    started: dict[str, Served] = {}
    try:
        for family in FAMILIES:
            folder = tmp_path_factory.mktemp(family.name)
            checkpoints.make_native(folder) if family.name == "native" else checkpoints.make(folder, **family.options)
            started[family.name] = start_up(folder, vllm=EXACT)
        wait_ready(*started.values())
        yield started
    finally:
        for server in started.values():
            stop(server)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_answers(served: dict[str, Served], family: Family) -> None:
    def ask(*content: Any) -> tuple[int, list[int]]:
        answer = served[family.name].chat(*content, return_token_ids=True, ignore_eos=True)
        assert answer.status == 200, answer.text
        return answer.json["usage"]["prompt_tokens"], answer.json["choices"][0]["token_ids"]

    text, _ = ask("what is shown?")
    alone, first = ask(image_part("square.png"), "what is shown?")
    assert alone >= text + 256, "the image's tokens are in the prompt"
    assert ask(image_part("square.png"), "what is shown?") == (alone, first)
    assert ask(image_part("palette_512x512.png"), "what is shown?")[1] != first, "another image, another answer"
    both, _ = ask("Image-1: ", image_part("square.png"), "Image-2: ", image_part("palette_512x512.png"), "compare")
    assert both >= text + 512

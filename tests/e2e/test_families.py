"""Every language model that a family uses loads and answers questions about images, decoupled.

The vision worker's code encodes, the sink's store holds the embeddings, and vLLM's engine answers with our model class and
connector. The path through HTTP is tested with the golden checkpoints (Qwen2, Qwen3, Llama).
"""

from typing import Any

import pytest

from tests.e2e.families import FAMILIES, FamilyRun


@pytest.fixture(scope="module")
def results(family_run: FamilyRun) -> dict[str, dict[str, Any]]:
    """The results by family."""
    results = family_run.results(timeout_seconds=400)
    assert results, family_run.log.read_text(errors="replace")[-5000:]
    return results


@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_a_family_answers_questions_about_images(results: dict[str, dict[str, Any]], family_run: FamilyRun, name: str) -> None:
    assert name in results, "the process ended before this family"
    result = results[name]
    assert "error" not in result, f"{name}: {result['error']}\n{family_run.log.read_text(errors='replace')[-3000:]}"
    text, square, palette, both, swapped, wide, _literal = result["tokens"]
    assert all(len(tokens) == 8 for tokens in result["tokens"])
    assert square != palette, "another image has another answer"
    assert both != swapped, "the order of images matters"
    assert len({tuple(tokens) for tokens in (text, square, palette, wide)}) == 4
    rows = result["rows"]
    lengths = result["prompts"]
    assert lengths[1] - lengths[0] == lengths[2] - lengths[0] >= rows["square"] == 256
    assert lengths[3] == lengths[4] > 512
    assert lengths[5] - lengths[1] == rows["wide_1300x800"] - 256
    assert lengths[6] > lengths[1]
    assert result["visual"] == [0, 256, 256, 512, 512, rows["wide_1300x800"], 256], "text that resembles an image is text"

"""The bounds of requests that are prefilled in part."""

from types import SimpleNamespace
from typing import Any

import pytest

from lm_worker.partial_prefill import PartialPrefills, create_partial_prefills


def test_requests_hold_no_more_than_the_bound_together() -> None:
    bounds = PartialPrefills(max_tokens=1000, max_requests=3)
    assert bounds.admit("a", 600, 0)
    assert not bounds.admit("b", 500, 0)
    assert bounds.admit("b", 400, 0)
    assert not bounds.admit("a", 700, 600), "its next image does not fit beside b"
    bounds.release("b")
    assert bounds.admit("a", 700, 600)


def test_requests_are_bounded_in_number() -> None:
    bounds = PartialPrefills(max_tokens=1000, max_requests=2)
    assert [bounds.admit(name, 100, 0) for name in "abc"] == [True, True, False]
    assert bounds.admit("a", 200, 100), "it is one of them"
    bounds.release("b")
    assert bounds.admit("c", 100, 0)


def test_a_few_tokens_are_not_worth_a_step() -> None:
    bounds = PartialPrefills(max_tokens=1000, max_requests=2)
    assert not bounds.admit("a", 63, 0)
    assert not bounds.admit("a", 500, 500)
    assert not bounds.admit("a", 100, 200), "its prefix ends within the image"
    assert bounds.admit("a", 64, 0)


def engine(**changes: Any) -> Any:
    values = {"chunked": True, "hybrid": False, "lookahead": 0, "blocks": 100, "seqs": 10, "active": None, **changes}
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(
            enable_chunked_prefill=values["chunked"], max_num_seqs=values["seqs"], max_num_active_seqs=values["active"]
        ),
        model_config=SimpleNamespace(is_hybrid=values["hybrid"]),
        cache_config=SimpleNamespace(num_gpu_blocks=values["blocks"], block_size=16),
        num_prefill_lookahead_tokens=values["lookahead"],
    )


def test_the_bounds_are_a_share_of_the_engines_capacity() -> None:
    bounds = create_partial_prefills(engine(), 0.25)
    assert bounds.admit("a", 400, 0)
    assert not bounds.admit("a", 401, 0)
    assert bounds.admit("a", 100, 0)
    assert bounds.admit("b", 100, 0)
    assert not bounds.admit("c", 100, 0), "a quarter of ten places"


@pytest.mark.parametrize(
    ("changes", "share"),
    [({"chunked": False}, 1), ({"hybrid": True}, 1), ({"lookahead": 1}, 1), ({"blocks": None}, 1), ({"seqs": 1}, 0.5),
     ({"active": 1}, 0.5), ({}, 0)],
)  # fmt: skip
def test_nothing_is_prefilled_in_part_where_it_cannot_be(changes: dict[str, Any], share: float) -> None:
    assert not create_partial_prefills(engine(**changes), share).admit("a", 64, 0)

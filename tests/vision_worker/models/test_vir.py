"""The router's policies, and its attention against torch's own."""

import pytest
import torch

from common.layouts.base import Thresholds
from protos import vision_pb2 as pb
from tests.vision_worker import golden
from vision_worker.models import vir

THRESHOLDS = Thresholds(relative=0.2, absolute=0.5)


def test_a_single_tile_is_never_compressed() -> None:
    assert vir.select_policy(pb.Router.AUTO, Thresholds(0.0, 0.0)).route(torch.tensor([0.9])).tolist() == [False]


def test_a_score_must_exceed_both_thresholds() -> None:
    scores = torch.tensor([0.1, 0.4, 0.5, 0.6, 0.9, 0.95])  # the quantile is 0.4
    assert vir.select_policy(pb.Router.AUTO, THRESHOLDS).route(scores).tolist() == [False, False, True, True, True, True]
    strict = vir.select_policy(pb.Router.AUTO, Thresholds(0.5, 0.5)).route(scores)
    assert strict.tolist() == [False, False, False, True, True, True]


def test_the_quantile_is_interpolated() -> None:
    scores = torch.linspace(0.5, 1, 7)
    assert vir.Learned(0.25, 0.0).route(scores).tolist() == [False, False, True, True, True, True, True]


def test_tiles_with_equal_scores_are_not_compressed() -> None:
    assert not vir.select_policy(pb.Router.AUTO, THRESHOLDS).route(torch.full((7,), 0.9)).any()


@pytest.mark.parametrize(("mode", "expected"), [(pb.Router.OFF, False), (pb.Router.ALL, True)])
def test_fixed_policies_need_no_scores(mode: pb.Router.Mode, expected: bool) -> None:
    policy = vir.select_policy(mode, THRESHOLDS)
    assert not policy.needs_scores
    assert policy.route(torch.zeros(3)).tolist() == [expected] * 3


def test_modes_have_the_values_of_the_contract() -> None:
    assert {mode.name: mode.value for mode in vir.Mode} == dict(pb.Router.Mode.items())


def test_without_a_router_nothing_is_compressed() -> None:
    assert not vir.select_policy(pb.Router.AUTO, None).route(torch.ones(4)).any()


def test_pooling_is_multi_head_attention() -> None:
    """It equals `nn.MultiheadAttention`, though keys and values are computed only once."""
    pooling = golden.encoder("flash-qwen3").model.pooling_before_gating
    width = pooling.query_token.shape[1]
    features = torch.randn(2, 50, width, generator=torch.Generator().manual_seed(1))
    references = []
    for attention in (pooling.attn1, pooling.attn2):
        reference = torch.nn.MultiheadAttention(width, 16, batch_first=True)
        state = attention.state_dict()
        reference.load_state_dict({name: value.to_dense() if value.is_mkldnn else value for name, value in state.items()})
        references.append(reference)
    query = pooling.norm1(references[0](pooling.query_token.expand(2, 1, -1), features, features)[0])
    for _ in range(3):
        query = pooling.norm2(references[1](query, features, features)[0])
    torch.testing.assert_close(pooling(features), query[:, 0])


def test_unused_attention_layers_are_not_built() -> None:
    names = dict(golden.encoder("flash-qwen3").model.named_parameters())
    assert not [name for name in names if "attn3" in name or "norm4" in name]

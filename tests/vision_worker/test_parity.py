"""Grids, pixels, routes and embeddings are those of the official implementation."""

from itertools import chain

import numpy as np
import pytest
import torch

from tests.vision_worker import golden
from vision_worker.models.internvl import normalize

ALL = [pytest.param(case, id=case.id) for case in golden.cases(*golden.NAMES)]
SINGLE = [pytest.param(case, id=case.id) for case in golden.cases("flash-qwen3") if len(case.stems) == 1]


@pytest.mark.parametrize("case", ALL)
def test_grid_and_pixels_are_exact(case: golden.Case) -> None:
    encoder = golden.encoder(case.checkpoint)
    fields = case.fields
    for stem, file, grid, count in zip(case.stems, fields["images"], fields["grid"], fields["num_tiles"], strict=True):
        tiles = golden.tiles(encoder, file)
        assert [tiles.columns, tiles.rows] == grid
        assert len(tiles) == count
        sample = normalize(torch.from_numpy(np.array(tiles.pixels)))[:, :, ::64, ::64]
        assert torch.equal(sample, golden.expected(case.checkpoint)[f"{stem}.pixel_values.sample"])


@pytest.mark.parametrize("case", ALL)
def test_routes_and_embeddings_in_float32(case: golden.Case) -> None:
    result = golden.embed(case, torch.float32)
    assert result.compressed == list(chain(*case.fields["compressed"]))
    embeddings = golden.split_by_image(case, result)
    assert [len(embedding) for embedding in embeddings] == case.fields["visual_tokens"]
    for i, embedding in enumerate(embeddings):
        expected = case.sampled_embedding(i)
        assert expected is None or golden.relative_error(embedding[:: golden.SAMPLE_STRIDE], expected) < 1e-5


@pytest.mark.parametrize("case", SINGLE)
def test_router_scores(case: golden.Case) -> None:
    result = golden.embed(case, torch.float32)
    expected = golden.expected(case.checkpoint)[f"{case.stems[0]}.gate"][:, 0]
    torch.testing.assert_close(torch.tensor(result.scores), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL)
def test_bfloat16_agrees_with_float32(case: golden.Case) -> None:
    """Routes agree except for scores within rounding of a threshold; where all routes agree, so do the embeddings."""
    result = golden.embed(case, torch.bfloat16)
    exact = golden.embed(case, torch.float32)
    if exact.scores:
        scores, thresholds = torch.tensor(exact.scores), golden.encoder(case.checkpoint).checkpoint.description.thresholds
        assert thresholds is not None
        quantile = torch.quantile(scores, thresholds.relative)
        margins = torch.minimum((scores - quantile).abs(), (scores - thresholds.absolute).abs())
        for margin, route, exact_route in zip(margins.tolist(), result.compressed, exact.compressed, strict=True):
            assert route == exact_route or margin < 0.05
    if result.compressed == exact.compressed:
        for actual, expected in zip(golden.split_by_image(case, result), golden.split_by_image(case, exact), strict=True):
            assert golden.relative_error(actual, expected) < 2e-2

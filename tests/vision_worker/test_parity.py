"""Grids, pixels, routes and embeddings against the official implementation."""

from itertools import chain

import numpy as np
import pytest
import torch

from tests.vision_worker import golden
from vision_worker.models.internvl import normalised

ALL = [pytest.param(case, id=case.id) for case in golden.cases(*golden.NAMES)]
SINGLE = [pytest.param(case, id=case.id) for case in golden.cases("flash-qwen3") if len(case.stems) == 1]


@pytest.mark.parametrize("case", ALL)
def test_grid_and_pixels(case: golden.Case) -> None:
    made = golden.encoder(case.checkpoint)
    for stem, file, grid, count in zip(case.stems, case.said["images"], case.said["grid"], case.said["num_tiles"], strict=True):
        tiles = golden.tiles(made, file)
        assert [tiles.columns, tiles.rows] == grid
        assert len(tiles) == count
        sample = normalised(torch.from_numpy(np.array(tiles.pixels)))[:, :, ::64, ::64]
        wanted = golden.expected(case.checkpoint)[f"{stem}.pixel_values.sample"]
        assert torch.equal(sample, wanted)


@pytest.mark.parametrize("case", ALL)
def test_routes_and_embeddings_in_float32(case: golden.Case) -> None:
    result = golden.embedded(case, torch.float32)
    assert result.compressed == list(chain(*case.said["compressed"]))
    embeddings = golden.by_image(case, result)
    assert [len(embedding) for embedding in embeddings] == case.said["visual_tokens"]
    for i, embedding in enumerate(embeddings):
        wanted = case.embeds(i)
        assert wanted is None or golden.relative(embedding[:: golden.SAMPLE], wanted) < 1e-5


@pytest.mark.parametrize("case", SINGLE)
def test_scores(case: golden.Case) -> None:
    result = golden.embedded(case, torch.float32)
    wanted = golden.expected(case.checkpoint)[f"{case.stems[0]}.gate"][:, 0]
    torch.testing.assert_close(torch.tensor(result.scores), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ALL)
def test_bfloat16(case: golden.Case) -> None:
    """Routes agree except for scores within rounding of a threshold; where all agree, so do embeddings."""
    result = golden.embedded(case, torch.bfloat16)
    exact = golden.embedded(case, torch.float32)
    if exact.scores:
        scores, threshold = torch.tensor(exact.scores), golden.encoder(case.checkpoint).checkpoint.description.thresholds
        assert threshold is not None
        quantile = torch.quantile(scores, threshold.relative)
        margin = torch.minimum((scores - quantile).abs(), (scores - threshold.absolute).abs())
        for near, got, wanted in zip(margin.tolist(), result.compressed, exact.compressed, strict=True):
            assert got == wanted or near < 0.05
    if result.compressed == exact.compressed:
        for got, wanted in zip(golden.by_image(case, result), golden.by_image(case, exact), strict=True):
            assert golden.relative(got, wanted) < 2e-2

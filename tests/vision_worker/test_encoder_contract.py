"""The contract of `vision_worker.encoder.Encoder`, for every family. A new family adds a line to `CHECKPOINTS`."""

import functools
import io
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from common.checkpoint import open_checkpoint
from common.options import read_options
from common.tiling import Tiling
from tests.vision_worker import golden
from tests.vision_worker.images import pixels
from vision_worker import encoder as encoders
from vision_worker.config import VisionOptions
from vision_worker.encoder import FAMILIES, Encoder, FeatureGroup, GroupEmbedding
from vision_worker.models import vir
from vision_worker.preprocessing.tiling import Tiles

CHECKPOINTS = {
    "internvl": golden.FOLDER / "flash-qwen3/checkpoint",
    "fake": golden.FOLDER / "flash-qwen3/checkpoint",
}
"""A small checkpoint for each family."""

TILING = Tiling(min_tiles=1, max_tiles=4, thumbnail=True)
KEEP = vir.Fixed(False)


@functools.cache
def load(family: str, load_format: str = "auto") -> Encoder:
    path = str(CHECKPOINTS[family])
    flags = [path, f"--vision-backend={family}", "--device=cpu", "--vision-dtype=float32", f"--load-format={load_format}"]
    return encoders.load(read_options(VisionOptions, flags, {}), open_checkpoint(path))


@pytest.fixture(params=FAMILIES)
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return load(request.param)


def prepare(encoder: Encoder, name: str = "wide_1300x800.jpg") -> Tiles:
    return encoder.prepare(pixels(golden.image(name)), TILING)


def forward(encoder: Encoder, pixels: np.ndarray) -> torch.Tensor:
    return encoder.forward(encoder.stage(list(pixels)))


def embed(encoder: Encoder, tiles: Tiles, policy: vir.Policy) -> GroupEmbedding:
    return golden.project(encoder, forward(encoder, tiles.pixels), range(len(tiles)), policy)


def test_every_family_can_be_chosen_and_is_tested() -> None:
    assert get_args(VisionOptions.model_fields["vision_backend"].annotation) == tuple(FAMILIES) == tuple(CHECKPOINTS)


def test_an_encoder_describes_itself(encoder: Encoder) -> None:
    assert encoder.placement.dtype_name == "float32"
    assert encoder.checkpoint.description.width > 0
    sizes = encoder.warmup_batch_sizes(4)
    assert sizes
    assert all(1 <= size <= 4 for size in sizes)


def test_prepare_cuts_an_image_into_tiles(encoder: Encoder) -> None:
    tiles = prepare(encoder)
    side = encoder.checkpoint.description.tower.image_size
    assert tiles.pixels.dtype == np.uint8
    assert tiles.pixels.shape == (len(tiles), side, side, 3)
    assert len(tiles.hashes) == len(tiles) == tiles.columns * tiles.rows + 1


def test_prepare_gives_equal_tiles_equal_hashes(encoder: Encoder) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (1000, 500), "teal").save(buffer, "PNG")
    assert len(set(encoder.prepare(pixels(buffer.getvalue()), TILING).hashes)) == 1


def test_features_of_a_tile_do_not_depend_on_its_batch(encoder: Encoder) -> None:
    pixels = prepare(encoder).pixels
    together = forward(encoder, pixels)
    assert len(together) == len(pixels)
    for i in range(len(pixels)):
        torch.testing.assert_close(forward(encoder, pixels[i : i + 1])[0], together[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compress", [False, True])
def test_project_gives_each_tile_its_visual_tokens(encoder: Encoder, compress: bool) -> None:
    description = encoder.checkpoint.description
    tiles = prepare(encoder)
    result = embed(encoder, tiles, vir.Fixed(compress))
    rows = description.compressed_tokens_per_tile if compress else description.tokens_per_tile
    assert [tuple(block.shape) for block in result.blocks] == [(rows, description.width)] * len(tiles)
    assert all(block.dtype == encoder.placement.dtype and bool(block.isfinite().all()) for block in result.blocks)
    assert result.compressed == [compress] * len(tiles)
    assert result.scores == [], "a policy that needs no scores gets none"


def test_a_learned_policy_routes_by_scores(encoder: Encoder) -> None:
    policy = vir.Learned(0.5, 0.0)
    result = embed(encoder, prepare(encoder), policy)
    assert all(0 <= score <= 1 for score in result.scores)
    assert result.compressed == policy.route(torch.tensor(result.scores)).tolist()
    assert result.routing_seconds >= 0


def test_groups_that_are_projected_together_are_as_alone(encoder: Encoder) -> None:
    features = forward(encoder, prepare(encoder).pixels)
    groups = [
        FeatureGroup(features[:2], [0, 1, 0], vir.Learned(0.0, 0.0)),
        FeatureGroup(features[2:3], [0], vir.Fixed(True)),
        FeatureGroup(features, range(len(features)), vir.Learned(0.5, 0.0)),
        FeatureGroup(features[1:2], [0], KEEP),
    ]
    for group, result in zip(groups, encoder.project(groups), strict=True):
        alone = encoder.project([group])[0]
        assert result.compressed == alone.compressed
        assert result.scores == pytest.approx(alone.scores, abs=1e-5)
        for block, expected in zip(result.blocks, alone.blocks, strict=True):
            torch.testing.assert_close(block, expected, rtol=1e-4, atol=1e-5)


def test_repeated_tiles_share_their_features(encoder: Encoder) -> None:
    features = forward(encoder, prepare(encoder).pixels[:2])
    result = golden.project(encoder, features, [0, 1, 0], vir.Learned(0.0, 0.0))
    assert [len(values) for values in (result.blocks, result.compressed, result.scores)] == [3, 3, 3]
    assert torch.equal(result.blocks[0], result.blocks[2])
    assert (result.compressed[0], result.scores[0]) == (result.compressed[2], result.scores[2])


def test_different_images_have_different_embeddings(encoder: Encoder) -> None:
    first, second = (embed(encoder, prepare(encoder, name), KEEP).blocks[0] for name in ("square.png", "palette_512x512.png"))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_keep_the_shapes(family: str) -> None:
    tiles = prepare(load(family), "square.png")
    dummy = load(family, "dummy")
    assert [b.shape for b in embed(dummy, tiles, KEEP).blocks] == [b.shape for b in embed(load(family), tiles, KEEP).blocks]

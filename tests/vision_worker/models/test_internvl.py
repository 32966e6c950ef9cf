"""The InternVL family as one encoder: shuffle, batching, compilation, checkpoints of transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config

from common.checkpoint import open_checkpoint
from tests.vision_worker import golden
from vision_worker.encoder import Placement
from vision_worker.models import internvl, vir
from vision_worker.models.internvl import normalize, pixel_shuffle

CPU = Placement(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("factor", [0.5, 0.25])
def test_pixel_shuffle_gathers_squares(factor: float) -> None:
    """With v2 token (y, x) holds the step × step square at (y, x); with v1 x and y are exchanged."""
    side, width, step = 8, 3, round(1 / factor)
    grid = torch.arange(side * side * width, dtype=torch.float32).view(1, side, side, width)
    small = side // step
    squares = [
        grid[0, y * step : (y + 1) * step, x * step : (x + 1) * step].reshape(-1)
        for y in range(small) for x in range(small)
    ]  # fmt: skip
    v2 = pixel_shuffle(grid.flatten(1, 2), factor, "v2")[0]
    v1 = pixel_shuffle(grid.flatten(1, 2), factor, "v1")[0]
    torch.testing.assert_close(v2.sort(-1).values, torch.stack(squares).sort(-1).values)
    torch.testing.assert_close(v1.view(small, small, -1).swapaxes(0, 1).flatten(0, 1), v2)


@pytest.mark.parametrize("batch_tiles", [1, 64])
def test_an_embedding_does_not_depend_on_its_batch(batch_tiles: int) -> None:
    """The same image alone, and its tiles among those of other images."""
    encoder = golden.encoder("flash-qwen3")
    tiles = golden.tiles(encoder, "wide_1300x800.jpg").pixels
    others = np.random.default_rng(0).integers(0, 256, (max(0, batch_tiles - len(tiles)), *tiles.shape[1:]), dtype=np.uint8)
    mixed = encoder.forward(encoder.stage([*others, *tiles]))[-len(tiles) :]
    alone = golden.features("flash-qwen3", "wide_1300x800.jpg", torch.float32)
    policy = vir.select_policy(0, encoder.checkpoint.description.thresholds)
    first, second = (golden.project(encoder, features, range(len(tiles)), policy) for features in (alone, mixed))
    assert first.compressed == second.compressed
    assert True in first.compressed
    assert golden.relative_error(torch.cat(second.blocks), torch.cat(first.blocks)) < 2e-6


def test_a_compiled_tower_computes_the_same_features() -> None:
    checkpoint = open_checkpoint(golden.FOLDER / "flash-qwen3/checkpoint")
    compiled = internvl.load(checkpoint, Placement(torch.device("cpu"), torch.float32, is_compiled=True))
    plain = golden.encoder("flash-qwen3")
    assert (compiled.warmup_batch_sizes(2), plain.warmup_batch_sizes(2)) == ([2, 1], [2])
    tiles = golden.tiles(compiled, "wide_1300x800.jpg").pixels[:2]
    assert golden.relative_error(compiled.forward(compiled.stage(list(tiles))), plain.forward(plain.stage(list(tiles)))) < 2e-6


def test_a_compiled_tower_compiles_nothing_while_requests_wait() -> None:
    checkpoint = open_checkpoint(golden.FOLDER / "flash-qwen3/checkpoint")
    encoder = internvl.load(checkpoint, Placement(torch.device("cpu"), torch.float32, is_compiled=True))
    tiles = list(golden.tiles(encoder, "wide_1300x800.jpg").pixels)
    for size in encoder.warmup_batch_sizes(4):
        encoder.forward(encoder.stage(tiles[:1] * size))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (3, 4, 2, 1):
            encoder.forward(encoder.stage(tiles[:size]))


@pytest.mark.parametrize("compress", [False, True])
def test_equal_tiles_are_computed_once(compress: bool) -> None:
    encoder = golden.encoder("flash-qwen3")
    features = golden.features("flash-qwen3", "seed_800x1300.png", torch.float32)[:2]
    result = golden.project(encoder, features, [0, 1, 0], vir.Fixed(compress))
    assert [len(block) for block in result.blocks] == [64 if compress else 256] * 3
    assert torch.equal(result.blocks[0], result.blocks[2])
    assert result.scores == []


def test_dummy_weights_are_seeded_and_finite() -> None:
    checkpoint = open_checkpoint(golden.FOLDER / "flash-qwen3/checkpoint")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 448, 448, 3), dtype=np.uint8)
    policy = vir.select_policy(0, checkpoint.description.thresholds)
    results = []
    for _ in range(2):
        encoder = internvl.load(checkpoint, CPU, dummy=True)
        features = encoder.forward(encoder.stage(list(pixels)))
        results.append(torch.cat(golden.project(encoder, features, range(2), policy).blocks))
    assert torch.equal(*results)
    assert results[0].isfinite().all()


@pytest.mark.parametrize("style", ["300m", "6b"])
def test_features_of_a_transformers_checkpoint_are_those_of_transformers(tmp_path: Path, style: str) -> None:
    torch.manual_seed(0)
    large = style == "6b"
    vision = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": [448, 448], "patch_size": [14, 14], "norm_type": "rms_norm" if large else "layer_norm",
        "use_qk_norm": large, "attention_bias": not large,
    }  # fmt: skip
    text = Qwen2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=64
    )
    config = InternVLConfig(vision_config=vision, text_config=text.to_dict(), image_token_id=5)
    theirs = InternVLForConditionalGeneration(config).eval()
    for parameter in theirs.model.vision_tower.parameters():
        torch.nn.init.normal_(parameter, 0.05, 0.1)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"max_patches": 9}}')
    encoder = internvl.load(open_checkpoint(tmp_path), CPU)
    assert encoder.checkpoint.description.max_tiles == 9
    pixels = np.random.default_rng(1).integers(0, 256, (2, 448, 448, 3), dtype=np.uint8)
    features = encoder.forward(encoder.stage(list(pixels)))
    actual = torch.stack(golden.project(encoder, features, range(2), vir.Fixed(False)).blocks)
    with torch.no_grad():
        expected = theirs.model.get_image_features(normalize(torch.from_numpy(pixels))).pooler_output
    assert golden.relative_error(actual, expected) < 1e-5

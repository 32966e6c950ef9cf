from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config

from common.checkpoint import open_checkpoint
from tests.vision_worker import golden
from vision_worker.encoder import Placement
from vision_worker.models import internvl, vir
from vision_worker.models.internvl import normalised, pixel_shuffle

CPU = Placement(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("factor", [0.5, 0.25])
def test_pixel_shuffle_gathers_squares(factor: float) -> None:
    """Token (y, x) of v2 holds the step × step square at (y, x); v1 has x and y exchanged."""
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


@pytest.mark.parametrize("together", [1, 64])
def test_an_embedding_does_not_depend_on_its_batch(together: int) -> None:
    """The same image alone, and its tiles among those of strangers."""
    made = golden.encoder("flash-qwen3")
    own = golden.tiles(made, "wide_1300x800.jpg").pixels
    strangers = np.random.default_rng(0).integers(0, 256, (max(0, together - len(own)), *own.shape[1:]), dtype=np.uint8)
    mixed = made.forward(made.stage([*strangers, *own]))[-len(own) :]
    alone = golden.features("flash-qwen3", "wide_1300x800.jpg", torch.float32)
    policy = vir.policy(0, made.checkpoint.description.thresholds)
    first, second = (made.project(seen, range(len(own)), policy) for seen in (alone, mixed))
    assert first.compressed == second.compressed
    assert True in first.compressed
    assert golden.relative(torch.cat(second.blocks), torch.cat(first.blocks)) < 2e-6


def test_compiled_it_sees_the_same() -> None:
    checkpoint = open_checkpoint(golden.FOLDER / "flash-qwen3/checkpoint")
    made = internvl.load(checkpoint, Placement(torch.device("cpu"), torch.float32, compile_for=2))
    plain = golden.encoder("flash-qwen3")
    assert (made.sizes(2), plain.sizes(2)) == ([1, 2], [2])
    tiles = golden.tiles(made, "wide_1300x800.jpg").pixels[:2]
    assert golden.relative(made.forward(made.stage(tiles)), plain.forward(plain.stage(tiles))) < 2e-6


@pytest.mark.parametrize("compress", [False, True])
def test_equal_tiles_are_computed_once(compress: bool) -> None:
    made = golden.encoder("flash-qwen3")
    seen = golden.features("flash-qwen3", "seed_800x1300.png", torch.float32)[:2]
    result = made.project(seen, [0, 1, 0], vir.Fixed(compress))
    assert [len(block) for block in result.blocks] == [64 if compress else 256] * 3
    assert torch.equal(result.blocks[0], result.blocks[2])
    assert result.scores == []


def test_dummy_weights_are_seeded_and_finite() -> None:
    checkpoint = open_checkpoint(golden.FOLDER / "flash-qwen3/checkpoint")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 448, 448, 3), dtype=np.uint8)
    policy = vir.policy(0, checkpoint.description.thresholds)
    results = []
    for _ in range(2):
        made = internvl.load(checkpoint, CPU, dummy=True)
        results.append(torch.cat(made.project(made.forward(made.stage(pixels)), range(2), policy).blocks))
    assert torch.equal(*results)
    assert results[0].isfinite().all()


@pytest.mark.parametrize("style", ["300m", "6b"])
def test_a_checkpoint_of_transformers(tmp_path: Path, style: str) -> None:
    """`save_pretrained`, then loaded here: the features are those of transformers."""
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
    made = internvl.load(open_checkpoint(tmp_path), CPU)
    assert made.checkpoint.description.max_tiles == 9
    pixels = np.random.default_rng(1).integers(0, 256, (2, 448, 448, 3), dtype=np.uint8)
    got = torch.stack(made.project(made.forward(made.stage(pixels)), range(2), vir.Fixed(False)).blocks)
    with torch.no_grad():
        wanted = theirs.model.get_image_features(normalised(torch.from_numpy(pixels))).pooler_output
    assert golden.relative(got, wanted) < 1e-5

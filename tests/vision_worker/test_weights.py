"""Loading weights: conversion, and errors that name the tensor or the field."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.checkpoint import CheckpointError, open_checkpoint
from tests.vision_worker import golden
from vision_worker.encoder import Placement
from vision_worker.models import internvl, onednn

CPU = Placement(torch.device("cpu"), torch.float32)
NAME = "vision_model.encoder.layers.1.mlp.fc1.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a golden checkpoint that a test may damage."""
    return Path(shutil.copytree(golden.FOLDER / "flash-qwen3/checkpoint", tmp_path / "checkpoint"))


def rewrite(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / "model.safetensors")


def test_a_missing_tensor_is_named_in_the_error(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[NAME]
    rewrite(folder, tensors)
    with pytest.raises(CheckpointError, match=NAME):
        internvl.load(open_checkpoint(folder), CPU)


def test_a_wrong_shape_is_reported_with_both_shapes(folder: Path) -> None:
    rewrite(folder, load_file(folder / "model.safetensors") | {NAME: torch.zeros(7, 64)})
    with pytest.raises(CheckpointError, match=r"fc1.weight.*\[7, 64\].*\[128, 64\]"):
        internvl.load(open_checkpoint(folder), CPU)


def test_a_truncated_file_is_rejected(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut short"):
        internvl.load(open_checkpoint(folder), CPU)


def test_a_folder_without_weights_is_rejected_unless_they_are_random(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is the download complete"):
        internvl.load(open_checkpoint(folder), CPU)
    assert internvl.load(open_checkpoint(folder), CPU, dummy=True)


def test_an_unsupported_dtype_is_rejected(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    rewrite(folder, tensors | {NAME: tensors[NAME].to(torch.float8_e4m3fn)})
    with pytest.raises(CheckpointError, match="F8_E4M3"):
        internvl.load(open_checkpoint(folder), CPU)


def test_unused_tensors_may_be_missing(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    rewrite(folder, {k: v for k, v in tensors.items() if not any(f"{n}{i}" in k for n in ("attn", "norm") for i in (3, 4))})
    assert internvl.load(open_checkpoint(folder), CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_converted_exactly(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "is_supported", lambda *_: False)  # it packs weights
    checkpoint = golden.FOLDER / "flash-qwen3/checkpoint"
    stored = load_file(checkpoint / "model.safetensors")
    encoder = internvl.load(open_checkpoint(checkpoint), Placement(torch.device("cpu"), dtype))
    for name, parameter in encoder.model.named_parameters():
        assert torch.equal(parameter, stored[name].to(dtype)), name


def test_positions_of_another_image_size_are_interpolated(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "vision_model.embeddings.position_embedding"
    rewrite(folder, tensors | {name: tensors[name][:, : 16 * 16 + 1].clone()})
    encoder = internvl.load(open_checkpoint(folder), CPU)
    assert encoder.forward(encoder.stage(list(golden.tiles(encoder, "square.png").pixels))).shape == (1, 1024, 64)

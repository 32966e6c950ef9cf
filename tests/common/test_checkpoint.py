"""Descriptions and fingerprints of checkpoints, and errors for folders that are not one."""

import json
import shutil
from pathlib import Path

import pytest

from common.checkpoint import CheckpointError, TensorSlice, open_checkpoint, read_header
from common.layouts.base import Thresholds
from tests.hub import VISION, split_checkpoint

GOLDEN = Path(__file__).parents[1] / "data/golden"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "flash-qwen3/checkpoint", tmp_path / "c"))


def change(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_the_description_of_a_flash_checkpoint() -> None:
    description = open_checkpoint(GOLDEN / "flash-qwen3/checkpoint").description
    assert (description.family, description.language_model) == ("InternVL 3.5 Flash", "Qwen3ForCausalLM")
    assert (description.tokens_per_tile, description.compressed_tokens_per_tile) == (256, 64)
    assert (description.max_tiles, description.thumbnail) == (12, True)
    assert description.thresholds == Thresholds(0.2, 0.5)


def test_the_description_of_a_6b_tower() -> None:
    description = open_checkpoint(GOLDEN / "vit6b-llama/checkpoint").description
    assert (description.tower.norm, description.tower.qk_norm, description.tower.qkv_bias, description.tower.select_layer) == (
        "rms_norm",
        True,
        False,
        -4,
    )
    assert (description.pixel_shuffle, description.max_tiles, description.thresholds) == ("v1", 6, None)


def test_the_fingerprint_depends_on_what_determines_an_embedding(copy: Path) -> None:
    original = open_checkpoint(GOLDEN / "flash-qwen3/checkpoint").fingerprint
    assert open_checkpoint(copy).fingerprint == original, "the folder does not matter"
    change(copy, flash_relative_threshold=0.3)
    assert open_checkpoint(copy).fingerprint != original
    change(copy, flash_relative_threshold=0.2)
    file = copy / "model.safetensors"
    tensor = open_checkpoint(copy).vision_tensors["mlp1.3.weight"]
    data = bytearray(file.read_bytes())
    data[tensor.offset] ^= 1
    file.write_bytes(data)
    assert open_checkpoint(copy).fingerprint != original


def flip_first_byte(folder: Path, name: str) -> None:
    file = next(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[read_header(file)[name].offset] ^= 1
    file.write_bytes(data)


def test_the_language_fingerprint_depends_on_each_language_tensor(copy: Path) -> None:
    original = open_checkpoint(GOLDEN / "flash-qwen3/checkpoint").language_fingerprint()
    assert open_checkpoint(copy).language_fingerprint() == original, "the folder does not matter"
    flip_first_byte(copy, "mlp1.3.weight")
    assert open_checkpoint(copy).language_fingerprint() == original, "vision tensors do not matter"
    names = [name for name in read_header(copy / "model.safetensors") if name.startswith("language_model.")]
    for name in names:
        flip_first_byte(copy, name)
        assert open_checkpoint(copy).language_fingerprint() != original
        flip_first_byte(copy, name)
    assert open_checkpoint(copy).language_fingerprint() == original


def test_the_language_fingerprint_does_not_depend_on_shards_nor_on_files_of_the_vision_part(tmp_path: Path) -> None:
    source = GOLDEN / "flash-qwen3/checkpoint"
    shards = split_checkpoint(source, tmp_path / "shards")
    (shards / VISION).unlink()
    assert open_checkpoint(shards).language_fingerprint() == open_checkpoint(source).language_fingerprint()


def test_random_weights_have_the_fingerprint_of_their_configuration(copy: Path) -> None:
    with_weights = open_checkpoint(copy).language_fingerprint(weights=False)
    (copy / "model.safetensors").unlink()
    assert open_checkpoint(copy).language_fingerprint(weights=False) == with_weights
    config = json.loads((copy / "config.json").read_text())
    config["llm_config"]["num_hidden_layers"] += 1
    change(copy, **config)
    assert open_checkpoint(copy).language_fingerprint(weights=False) != with_weights


def test_of_many_tensors_only_some_are_read(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in read_header(copy / "model.safetensors") if name.startswith("language_model.")]
    sampled = []

    def sample(tensor: TensorSlice) -> bytes:
        sampled.append(tensor)
        return b""

    monkeypatch.setattr("common.checkpoint._MAX_SAMPLED_TENSORS", len(names) // 3)
    monkeypatch.setattr("common.checkpoint._sample", sample)
    open_checkpoint(copy).language_fingerprint()
    assert len(names) // 4 <= len(sampled) <= len(names) // 3


def test_only_vision_tensors_are_listed() -> None:
    names = open_checkpoint(GOLDEN / "flash-qwen3/checkpoint").vision_tensors
    assert "vision_model.embeddings.class_embedding" in names
    assert not [name for name in names if name.startswith("language_model.")]


def test_only_shards_with_vision_tensors_are_opened(copy: Path) -> None:
    names = open_checkpoint(copy).vision_tensors
    (copy / "model.safetensors").rename(copy / "a.safetensors")
    (copy / "b.safetensors").write_bytes(b"not opened, else this would be an error")
    weight_map = {**dict.fromkeys(names, "a.safetensors"), "language_model.x": "b.safetensors"}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert set(open_checkpoint(copy).vision_tensors) == set(names)


def test_a_missing_shard_is_an_error(copy: Path) -> None:
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"mlp1.0.weight": "gone.safetensors"}}))
    with pytest.raises(CheckpointError, match="gone.safetensors"):
        _ = open_checkpoint(copy).vision_tensors


@pytest.mark.parametrize("cut", [4, 1000, -100])
def test_a_truncated_file_is_an_error(copy: Path, cut: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        _ = open_checkpoint(copy).vision_tensors


def test_a_folder_without_a_checkpoint_is_an_error_of_one_line(copy: Path, tmp_path: Path) -> None:
    cases: list[tuple[Path, str]] = [(tmp_path / "absent", "no checkpoint at"), (tmp_path, "no config.json")]
    for name, text, message in [
        ("broken", "{", "cannot read config.json"),
        ("list", "[]", "not a JSON object"),
        ("foreign", '{"model_type": "llava"}', "'llava'.*internvl_chat"),
        ("empty", '{"model_type": "internvl_chat"}', "vision_config"),
    ]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
        cases.append((tmp_path / name, message))
    for path, message in cases:
        with pytest.raises(CheckpointError, match=message) as caught:
            open_checkpoint(path)
        assert "\n" not in str(caught.value)

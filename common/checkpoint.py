"""Reads the description of a checkpoint from its JSON files and safetensors headers, without a tensor library.

Vision and language workers must agree on it: dimensions, thresholds, and the fingerprint, which is part of every cache key.
"""

import functools
import hashlib
import json
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.layouts import LAYOUTS
from common.layouts.base import Description, Layout

_INDEX = "model.safetensors.index.json"
_SAMPLE_BYTES = 4096
_MAX_HEADER_BYTES = 100 << 20


class CheckpointError(Exception):
    """A path is not a checkpoint that can be served. The message is one line for the operator."""


@dataclass(frozen=True)
class TensorSlice:
    """A tensor in a safetensors file: `length` bytes from byte `offset` of `file` on."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder and the description read from its configuration."""

    path: Path
    layout_name: str
    description: Description

    @property
    def layout(self) -> Layout:
        """The layout of this checkpoint: how its configuration and tensor names are read."""
        return LAYOUTS[self.layout_name]

    @functools.cached_property
    def vision_tensors(self) -> dict[str, TensorSlice]:
        """The tensors that a vision worker needs, by name; empty if the folder has no weights.

        Only the files that hold such a tensor are opened. Raises: `CheckpointError` if one is missing or damaged.
        """
        prefixes = self.layout.vision_prefixes
        files = {file for name, file in _files_by_tensor(self.path).items() if name is None or name.startswith(prefixes)}
        return {
            name: tensor
            for file in sorted(files)
            for name, tensor in read_header(self.path / file).items()
            if name.startswith(prefixes)
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the inputs that determine an embedding.

        It covers the description, and the name, dtype, shape and first and last 4 KiB of every vision tensor. Reading all of a
        6B tower at start would take minutes on a network disk.
        """
        digest = hashlib.sha256(json.dumps(asdict(self.description), sort_keys=True).encode())
        for name, tensor in sorted(self.vision_tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
            with tensor.file.open("rb") as file:
                for offset in (0, max(0, tensor.length - _SAMPLE_BYTES)):
                    file.seek(tensor.offset + offset)
                    digest.update(file.read(min(_SAMPLE_BYTES, tensor.length)))
        return digest.hexdigest()

    def as_json(self) -> dict[str, Any]:
        """The description as `dvd describe` prints it."""
        description = self.description
        return {
            "path": str(self.path),
            "family": description.family,
            "layout": self.layout_name,
            "vision_tower": asdict(description.tower),
            "language_model": description.language_model,
            "width": description.width,
            "context": description.context,
            "dtype": description.dtype,
            "template": description.template,
            "pixel_shuffle": description.pixel_shuffle,
            "tiles": {"min": description.min_tiles, "max": description.max_tiles, "thumbnail": description.thumbnail},
            "tokens_per_tile": description.tokens_per_tile,
            "compressed_tokens_per_tile": description.compressed_tokens_per_tile or None,
            "thresholds": asdict(description.thresholds) if description.thresholds else None,
            "fingerprint": self.fingerprint,
        }


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Return the checkpoint in a folder. Raises: `CheckpointError` with one line that says what is wrong with it."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint at {str(path)!r}: give a folder with config.json and safetensors files")
    config = _read_json(folder / "config.json")
    model_type = config.get("model_type")
    if model_type not in LAYOUTS:
        supported = ", ".join(sorted(LAYOUTS))
        raise CheckpointError(f"{str(path)!r} has model_type {model_type!r}, which is not supported: expected {supported}")
    try:
        description = LAYOUTS[model_type].describe(config, _preprocessor_config(folder))
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"config.json of {str(path)!r} lacks or misspells {error}") from None
    return Checkpoint(path=folder.resolve(), layout_name=str(model_type), description=description)


def _preprocessor_config(folder: Path) -> dict[str, Any]:
    """The image processor's configuration: a file of its own, or a part of the one that transformers 5 saves. May be empty."""
    separate, combined = folder / "preprocessor_config.json", folder / "processor_config.json"
    if separate.is_file():
        return _read_json(separate)
    return dict(_read_json(combined).get("image_processor", {})) if combined.is_file() else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no {path.name} in {str(path.parent)!r}: is this the folder of a checkpoint?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path.name} in {str(path.parent)!r}: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} in {str(path.parent)!r} is not a JSON object")
    return value


def _files_by_tensor(folder: Path) -> dict[str | None, str]:
    """The file of each tensor, by the tensor's name; without an index, the only file under the name None."""
    if (folder / _INDEX).is_file():
        weight_map: dict[str | None, str] = dict(_read_json(folder / _INDEX)["weight_map"])
        missing = {f for f in weight_map.values() if not (folder / f).is_file()}
        if missing:
            raise CheckpointError(f"{_INDEX} names {sorted(missing)[0]!r}, which is missing: download it again")
        return weight_map
    if (folder / "model.safetensors").is_file():
        return {None: "model.safetensors"}
    return {}


def read_header(file: Path) -> dict[str, TensorSlice]:
    """Return the tensors of a safetensors file, from its header alone. Raises: `CheckpointError` if the file is damaged."""
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > min(size, _MAX_HEADER_BYTES):
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(opened.read(length))
        start = 8 + length
        tensors = {
            name: TensorSlice(file, t["dtype"], tuple(t["shape"]), start + t["data_offsets"][0],
                              t["data_offsets"][1] - t["data_offsets"][0])
            for name, t in header.items()
            if name != "__metadata__"
        }  # fmt: skip
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise CheckpointError(f"{file.name} is not a valid safetensors file ({error}): download it again") from None
    if any(t.offset + t.length > size for t in tensors.values()):
        raise CheckpointError(f"{file.name} is cut short at {size} bytes: download it again")
    return tensors

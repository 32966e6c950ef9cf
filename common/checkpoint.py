"""Reads the description of a checkpoint from its JSON files and safetensors headers, without a tensor library.

Vision and language workers must agree on it: dimensions, thresholds, and the fingerprint, which is part of every cache key.
"""

import functools
import hashlib
import json
import re
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.layouts import LAYOUTS
from common.layouts.base import Description, Layout

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_COMMIT = re.compile(r"models--[^/]+/snapshots/([0-9a-f]{40})$")
"""Folder of a snapshot in the cache of Hugging Face's hub, which is named after its commit."""

_SAMPLE_BYTES = 4096
_MAX_SAMPLED_TENSORS = 2048
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

        Only the files that hold such a tensor are opened; others may be missing. Raises: `CheckpointError` if one of them is
        missing or damaged.
        """
        return self._tensors(self.vision_files, is_vision=True)

    @functools.cached_property
    def commit(self) -> str | None:
        """Commit of a snapshot in the cache of Hugging Face's hub; None for any other folder."""
        match = _COMMIT.search(self.path.as_posix())
        return match and match[1]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the inputs that determine an embedding.

        It covers the description, and of the vision weights either the commit of the hub's snapshot, which a language worker
        has without them, or the name, dtype, shape and first and last 4 KiB of every tensor. Reading all of a 6B tower at
        start would take minutes on a network disk.
        """
        digest = hashlib.sha256(json.dumps(asdict(self.description), sort_keys=True).encode())
        if self.commit is not None:
            digest.update(self.commit.encode())
            return digest.hexdigest()
        for name, tensor in sorted(self.vision_tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode() + _sample(tensor))
        return digest.hexdigest()

    def language_fingerprint(self, *, weights: bool = True) -> str:
        """Return the SHA-256, in hex, of the inputs that determine what the language model generates.

        It covers the description, and name, dtype and shape of every language tensor. The first and last 4 KiB are read of
        each tensor, or of 2048 that are spread over all: a large mixture of experts has tens of thousands.

        Args:
            weights: Whether the tensors count; with random weights only the description does.

        Raises:
            CheckpointError: A file with a language tensor is missing or damaged.
        """
        digest = hashlib.sha256(json.dumps(asdict(self.description), sort_keys=True).encode())
        tensors = sorted(self._tensors(self.language_files, is_vision=False).items()) if weights else []
        step = -(-len(tensors) // _MAX_SAMPLED_TENSORS)
        for index, (name, tensor) in enumerate(tensors):
            digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
            if index % step == 0:
                digest.update(_sample(tensor))
        return digest.hexdigest()

    def _tensors(self, files: list[str], *, is_vision: bool) -> dict[str, TensorSlice]:
        prefixes = self.layout.vision_prefixes
        return {
            name: tensor
            for file in self._present_files(files)
            for name, tensor in read_header(file).items()
            if name.startswith(prefixes) == is_vision
        }

    @property
    def vision_files(self) -> list[str]:
        """Names of the files that hold a tensor of the vision part, whether or not they are present."""
        return self._files_of(lambda name: name.startswith(self.layout.vision_prefixes))

    @property
    def language_files(self) -> list[str]:
        """Names of the files that hold a tensor of the language model, whether or not they are present."""
        return self._files_of(lambda name: not name.startswith(self.layout.vision_prefixes))

    @property
    def lacks_files(self) -> bool:
        """Whether the index names a file that is missing, because only one half of the checkpoint was downloaded."""
        return any(not (self.path / file).is_file() for file in (self._weight_map or {}).values())

    def check_language_files(self) -> None:
        """Raise `CheckpointError` if a file that a language worker reads is missing or damaged.

        It reads the vision tensors for the fingerprint, unless that comes from the commit.
        """
        for file in self._present_files(self.language_files):
            read_header(file)
        if self.commit is None:
            self.vision_tensors  # noqa: B018

    @functools.cached_property
    def _weight_map(self) -> dict[str, str] | None:
        """The file of each tensor, by the tensor's name; None without an index."""
        return _read_index(self.path) if (self.path / INDEX).is_file() else None

    def _files_of(self, belongs: Callable[[str], bool]) -> list[str]:
        if self._weight_map is None:
            return [SINGLE_FILE]
        return sorted({file for name, file in self._weight_map.items() if belongs(name)})

    def _present_files(self, names: list[str]) -> list[Path]:
        """The paths of weight files; empty for a folder without weights. Raises: `CheckpointError` if one is missing."""
        files = [self.path / name for name in names if self._weight_map is not None or (self.path / name).is_file()]
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"{INDEX} names {file.name!r}, which is missing: download it again")
        return files

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


def _sample(tensor: TensorSlice) -> bytes:
    """Return the first and the last bytes of a tensor."""
    with tensor.file.open("rb") as file:
        samples = []
        for offset in (0, max(0, tensor.length - _SAMPLE_BYTES)):
            file.seek(tensor.offset + offset)
            samples.append(file.read(min(_SAMPLE_BYTES, tensor.length)))
    return b"".join(samples)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Return the checkpoint in a folder. Raises: `CheckpointError` with one line that says what is wrong with it."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise CheckpointError(
            f"no checkpoint at {str(path)!r}: give a folder with config.json and safetensors files, or ORG/NAME of a "
            "repository on Hugging Face's hub"
        )
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


def _read_index(folder: Path) -> dict[str, str]:
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{INDEX} in {str(folder)!r} has no weight_map from tensors to files: download it again")
    return weight_map


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

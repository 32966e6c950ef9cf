"""What a checkpoint on disk is: read from its JSON and from the headers of its safetensors, no tensor library needed.

Gateway-free knowledge that a vision worker and a language worker must agree on, hence here: dimensions, thresholds and the
fingerprint, which is part of every cache key.
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
_SAMPLE = 4096
_MAX_HEADER = 100 << 20


class CheckpointError(Exception):
    """A path that holds no checkpoint we can serve; the message is one line for the operator."""


@dataclass(frozen=True)
class TensorSlice:
    """Where a tensor lies: `offset` is that of its first byte in `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder and what it says of itself."""

    path: Path
    layout_name: str
    description: Description

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.layout_name]

    @functools.cached_property
    def vision_tensors(self) -> dict[str, TensorSlice]:
        """Name → place of every tensor a vision worker needs; only the files that hold one are opened. May be empty."""
        files = _shards(self.path)
        wanted = {
            file
            for name, file in files.items()
            if name is None or name.startswith(self.layout.vision_prefixes)
        }  # fmt: skip
        found: dict[str, TensorSlice] = {}
        for file in sorted(wanted):
            for name, tensor in read_header(self.path / file).items():
                if name.startswith(self.layout.vision_prefixes):
                    found[name] = tensor
        return found

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over what decides an embedding: the configuration and, of every vision tensor, name, dtype, shape and
        its first and last 4 KiB (reading all of a 6B tower at start would cost minutes on a network disk).
        """
        digest = hashlib.sha256(json.dumps(asdict(self.description), sort_keys=True).encode())
        for name, tensor in sorted(self.vision_tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
            with tensor.file.open("rb") as file:
                for offset in (0, max(0, tensor.length - _SAMPLE)):
                    file.seek(tensor.offset + offset)
                    digest.update(file.read(min(_SAMPLE, tensor.length)))
        return digest.hexdigest()

    def as_json(self) -> dict[str, Any]:
        """What `dvd describe` prints."""
        said = self.description
        tower = asdict(said.tower)
        return {
            "path": str(self.path),
            "family": said.family,
            "layout": self.layout_name,
            "vision_tower": tower,
            "language_model": said.language_model,
            "width": said.width,
            "context": said.context,
            "dtype": said.dtype,
            "template": said.template,
            "pixel_shuffle": said.pixel_shuffle,
            "tiles": {"min": said.min_tiles, "max": said.max_tiles, "thumbnail": said.thumbnail},
            "tokens_per_tile": said.tokens_per_tile,
            "compressed_tokens_per_tile": said.compressed_tokens_per_tile or None,
            "thresholds": asdict(said.thresholds) if said.thresholds else None,
            "fingerprint": self.fingerprint,
        }


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint's folder. Raises `CheckpointError` with one line that says what is wrong with it."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint at {str(path)!r}: give a folder with config.json and safetensors files")
    config = _json(folder / "config.json")
    kind = config.get("model_type")
    if kind not in LAYOUTS:
        known = ", ".join(sorted(LAYOUTS))
        raise CheckpointError(f"{str(path)!r} has model_type {kind!r}; served here: {known}")
    try:
        said = LAYOUTS[kind].describe(config, _preprocessor(folder))
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"config.json of {str(path)!r} lacks or misspells {error}") from None
    return Checkpoint(path=folder.resolve(), layout_name=str(kind), description=said)


def _preprocessor(folder: Path) -> dict[str, Any]:
    """Of the image processor: a file of its own, or a part of the one that transformers 5 saves. May be empty."""
    own, shared = folder / "preprocessor_config.json", folder / "processor_config.json"
    if own.is_file():
        return _json(own)
    return dict(_json(shared).get("image_processor", {})) if shared.is_file() else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no {path.name} in {str(path.parent)!r}: not a checkpoint's folder?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path.name} in {str(path.parent)!r}: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} in {str(path.parent)!r} is not a JSON object")
    return value


def _shards(folder: Path) -> dict[str | None, str]:
    """Tensor name → file; the name is None for a file whose content no index tells."""
    if (folder / _INDEX).is_file():
        weight_map: dict[str | None, str] = dict(_json(folder / _INDEX)["weight_map"])
        missing = {f for f in weight_map.values() if not (folder / f).is_file()}
        if missing:
            raise CheckpointError(f"{_INDEX} names {sorted(missing)[0]!r}, which is not there: download it again")
        return weight_map
    if (folder / "model.safetensors").is_file():
        return {None: "model.safetensors"}
    return {}


def read_header(file: Path) -> dict[str, TensorSlice]:
    """The tensors of a safetensors file, from its header alone. Raises `CheckpointError` where the file is damaged."""
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > min(size, _MAX_HEADER):
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
        raise CheckpointError(f"{file.name} is not a whole safetensors file ({error}): copy it again") from None
    if any(t.offset + t.length > size for t in tensors.values()):
        raise CheckpointError(f"{file.name} is cut short at {size} bytes: copy it again")
    return tensors

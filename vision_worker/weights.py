"""A checkpoint's vision tensors into a module built on the meta device, one by one.

Each is mapped, copied to its place in the compute dtype and unmapped again, so peak memory is the module's own parameters
plus one tensor, and of the checkpoint's files only the pages of the tower's own tensors are ever read.
"""

import logging
import mmap
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from common.checkpoint import Checkpoint, CheckpointError, TensorSlice

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_SEED = 20
_REPORT_EVERY = 100


def load(module: nn.Module, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Fill every parameter of `module`. Raises `CheckpointError` naming a tensor that is missing or of another shape."""
    sources = _sources(checkpoint)
    parameters = list(module.named_parameters())
    for number, (name, parameter) in enumerate(parameters, 1):
        filled = torch.empty(parameter.shape, dtype=dtype, device=device)
        for part, source, source_name in _parts(name, filled, sources, checkpoint.path):
            _check_shape(source_name, source, part)
            _read_into(part, source)
        _assign(module, name, filled)
        if number % _REPORT_EVERY == 0 or number == len(parameters):
            log.info("loaded %d of %d tensors", number, len(parameters))


def randomise(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Seeded random parameters, for `--load-format dummy`: costs are the true ones, results mean nothing."""
    generator = torch.Generator(device).manual_seed(_SEED)
    for name, parameter in list(module.named_parameters()):
        filled = torch.empty(parameter.shape, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)
        _assign(module, name, filled + 1 if _is_scale(module, name) else filled)


def positions(checkpoint: Checkpoint) -> int | None:
    """Rows of the stored position embedding, None where no weights are there: it may be of another image size."""
    stored = _sources(checkpoint).get(("vision_model.embeddings.position_embedding", None))
    return stored[0].shape[-2] if stored else None


_Sources = dict[tuple[str, int | None], tuple[TensorSlice, str]]


def _sources(checkpoint: Checkpoint) -> _Sources:
    """(our name, third of a fused tensor or None) → its place and the checkpoint's own name for it."""
    named = ((checkpoint.layout.vision_name(name), name) for name in checkpoint.vision_tensors)
    return {ours: (checkpoint.vision_tensors[name], name) for ours, name in named if ours is not None}


def _parts(name: str, filled: Tensor, sources: _Sources, path: Path) -> Iterator[tuple[Tensor, TensorSlice, str]]:
    if (name, 0) in sources:
        keys: list[tuple[str, int | None]] = [(name, third) for third in range(3)]
        views = list(filled.chunk(3))
    else:
        keys, views = [(name, None)], [filled]
    for key, view in zip(keys, views, strict=True):
        if key not in sources:
            raise CheckpointError(f"{str(path)!r} has no tensor {name!r}: is the download complete?")
        yield view, *sources[key]


def _check_shape(name: str, source: TensorSlice, part: Tensor) -> None:
    if source.shape != tuple(part.shape):
        raise CheckpointError(
            f"tensor {name!r} in {source.file.name} has shape {list(source.shape)}, config.json asks for {list(part.shape)}"
        )


def _read_into(part: Tensor, source: TensorSlice) -> None:
    stored = _STORED.get(source.dtype)
    if stored is None:
        raise CheckpointError(f"{source.file.name} has tensors of dtype {source.dtype}; read here: {', '.join(_STORED)}")
    start = source.offset - source.offset % mmap.ALLOCATIONGRANULARITY
    with source.file.open("rb") as file:
        # ACCESS_COPY: torch warns about read-only memory; nobody writes, so no page is ever copied
        mapped = mmap.mmap(file.fileno(), source.offset + source.length - start, access=mmap.ACCESS_COPY, offset=start)
    view = torch.frombuffer(mapped, dtype=stored, offset=source.offset - start, count=part.numel())
    part.copy_(view.view(part.shape))
    del view  # a mapping with views cannot be closed
    mapped.close()


def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def _is_scale(module: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf == "weight" and "Norm" in type(module.get_submodule(owner)).__name__

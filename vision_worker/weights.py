"""Loads a checkpoint's vision tensors, one by one, into a module that was built on the meta device.

Each tensor is mapped, copied to the device in the compute dtype and unmapped. Peak memory is the module's parameters plus
one tensor. Only the file pages of the vision tensors are read.
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
"""Dtypes that a tower can compute in, by name."""

_STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_SEED = 20
_LOG_EVERY_TENSORS = 100


def load(module: nn.Module, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Fill every parameter of `module` from the checkpoint.

    Raises: CheckpointError naming a tensor that is missing, has another shape or an unknown dtype.
    """
    sources = _sources(checkpoint)
    parameters = list(module.named_parameters())
    for number, (name, parameter) in enumerate(parameters, 1):
        value = torch.empty(parameter.shape, dtype=dtype, device=device)
        for part, source, source_name in _parts(name, value, sources, checkpoint.path):
            _check_shape(source_name, source, part)
            _read_into(part, source)
        _assign(module, name, value)
        if number % _LOG_EVERY_TENSORS == 0 or number == len(parameters):
            log.info("loaded %d of %d tensors", number, len(parameters))


def randomize(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Fill every parameter with seeded random values (`--load-format dummy`), for measurements without weights."""
    generator = torch.Generator(device).manual_seed(_SEED)
    for name, parameter in list(module.named_parameters()):
        value = torch.empty(parameter.shape, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)
        _assign(module, name, value + 1 if _is_norm_weight(module, name) else value)


def stored_positions(checkpoint: Checkpoint) -> int | None:
    """Rows of the stored position embedding, or None without weights. They may be for another image size."""
    stored = _sources(checkpoint).get(("vision_model.embeddings.position_embedding", None))
    return stored[0].shape[-2] if stored else None


_Sources = dict[tuple[str, int | None], tuple[TensorSlice, str]]


def _sources(checkpoint: Checkpoint) -> _Sources:
    """Map (our name, third of a fused tensor or None) to the tensor's place in a file and the checkpoint's own name."""
    names = ((checkpoint.layout.vision_name(name), name) for name in checkpoint.vision_tensors)
    return {key: (checkpoint.vision_tensors[name], name) for key, name in names if key is not None}


def _parts(name: str, value: Tensor, sources: _Sources, path: Path) -> Iterator[tuple[Tensor, TensorSlice, str]]:
    """Views of `value` with the source of each: three for a fused tensor that is stored in parts, otherwise one."""
    if (name, 0) in sources:
        keys: list[tuple[str, int | None]] = [(name, third) for third in range(3)]
        views = list(value.chunk(3))
    else:
        keys, views = [(name, None)], [value]
    for key, view in zip(keys, views, strict=True):
        if key not in sources:
            raise CheckpointError(f"{str(path)!r} has no tensor {name!r}: is the download complete?")
        yield view, *sources[key]


def _check_shape(name: str, source: TensorSlice, part: Tensor) -> None:
    if source.shape != tuple(part.shape):
        raise CheckpointError(
            f"tensor {name!r} in {source.file.name} has shape {list(source.shape)}, config.json requires {list(part.shape)}"
        )


def _read_into(part: Tensor, source: TensorSlice) -> None:
    stored_dtype = _STORED_DTYPES.get(source.dtype)
    if stored_dtype is None:
        known = ", ".join(_STORED_DTYPES)
        raise CheckpointError(f"{source.file.name} has tensors of dtype {source.dtype}; supported: {known}")
    start = source.offset - source.offset % mmap.ALLOCATIONGRANULARITY
    with source.file.open("rb") as file:
        # ACCESS_COPY because torch warns about read-only memory; nothing is written, so no page is copied
        mapped = mmap.mmap(file.fileno(), source.offset + source.length - start, access=mmap.ACCESS_COPY, offset=start)
    view = torch.frombuffer(mapped, dtype=stored_dtype, offset=source.offset - start, count=part.numel())
    part.copy_(view.view(part.shape))
    del view  # a mapping with views cannot be closed
    mapped.close()


def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def _is_norm_weight(module: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf == "weight" and "Norm" in type(module.get_submodule(owner)).__name__

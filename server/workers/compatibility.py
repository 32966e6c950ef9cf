"""Whether the workers serve the same checkpoint, and in dtypes that they can exchange."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from common import messages
from protos import embeddings_pb2 as pb
from protos.vision_pb2 import VisionDescription
from server.workers.worker import LanguageWorker, VisionWorker

_COMPARED = ("fingerprint", "width", "tile_size", "tokens_per_tile", "compressed_tokens_per_tile", "min_tiles", "max_tiles",
             "thumbnail", "relative_threshold", "absolute_threshold")  # fmt: skip
KNOWN_DTYPES = [number for number in pb.Dtype.values() if number != pb.DTYPE_UNSPECIFIED]
"""Dtypes of embeddings that this version of the gateway knows."""
_WIDE_DTYPES = (pb.BFLOAT16, pb.FLOAT16, pb.FLOAT32)
"""What a vision worker delivers that does not say."""

_UPDATE = "run the same version of all processes."
_MAX_NAMED_WORKERS = 4
"""Workers that a message names on each side."""


@dataclass(frozen=True)
class Mismatch:
    """What workers disagree on, with both values: `summary` is for callers, `details` names the workers for the operator."""

    summary: str
    details: str


def checkpoint_key(checkpoint: pb.CheckpointDescription) -> tuple[object, ...]:
    """Return what workers must agree on to work together. Workers of one checkpoint have equal keys."""
    return tuple(getattr(checkpoint, name) for name in _COMPARED)


def can_encode(vision: VisionDescription, checkpoint: pb.CheckpointDescription, dtype: int) -> bool:
    """Return whether a vision worker serves a checkpoint and delivers its embeddings in a dtype."""
    return checkpoint_key(vision.checkpoint) == checkpoint_key(checkpoint) and dtype in _delivered_dtypes(vision)


def _delivered_dtypes(vision: VisionDescription) -> Sequence[int]:
    return [*vision.embedding_dtypes] or _WIDE_DTYPES


def takes_images(language: LanguageWorker, vision: Iterable[VisionDescription]) -> bool:
    """Return whether one of these vision workers can encode for a language worker; False while it is down."""
    description = language.description
    return (
        description is not None
        and description.dtype in KNOWN_DTYPES
        and any(can_encode(worker, description.checkpoint, description.dtype) for worker in vision)
    )


def find_mixed_weights(workers: Iterable[LanguageWorker]) -> str | None:
    """Return which language workers of one checkpoint have different language weights, for the operator."""
    by_checkpoint: dict[str, dict[str, list[str]]] = {}
    for worker in workers:
        if worker.description is not None and worker.description.language_fingerprint:
            weights = by_checkpoint.setdefault(worker.description.checkpoint.fingerprint, {})
            weights.setdefault(worker.description.language_fingerprint, []).append(worker.address)
    mixed = next((weights for weights in by_checkpoint.values() if len(weights) > 1), None)
    if mixed is None:
        return None
    groups = " and ".join(f"{weights[:12]} ({_join_names(addresses)})" for weights, addresses in mixed.items())
    return f"Language workers have different language weights: {groups}; answers depend on the worker that gives them."


def find_mismatch(workers: Iterable[VisionWorker | LanguageWorker]) -> Mismatch | None:
    """Return what the workers that are up disagree on; None if they agree or too few are up to tell."""
    descriptions = [
        (f"{worker.kind} worker {worker.address}", worker.description) for worker in workers if worker.description is not None
    ]
    for name in _COMPARED:
        workers_by_value: dict[object, list[str]] = {}
        for worker_name, description in descriptions:
            workers_by_value.setdefault(getattr(description.checkpoint, name), []).append(worker_name)
        if len(workers_by_value) > 1:
            return _different_checkpoints(name, workers_by_value)
    vision = {name: description for name, description in descriptions if isinstance(description, VisionDescription)}
    for worker_name, description in descriptions:
        if isinstance(description, pb.LanguageDescription) and (mismatch := _dtype_mismatch(worker_name, description, vision)):
            return mismatch
    return None


def _dtype_mismatch(name: str, language: pb.LanguageDescription, vision: Mapping[str, VisionDescription]) -> Mismatch | None:
    """Return why embeddings cannot be delivered in the dtype that a language worker takes."""
    if language.dtype not in KNOWN_DTYPES:
        known = _join_dtypes(KNOWN_DTYPES)
        rest = f"takes embeddings in dtype number {language.dtype}, but this gateway knows {known}; {_UPDATE}"
        return Mismatch(f"A language worker {rest}", f"{name} {rest}")
    for vision_name, description in vision.items():
        if language.dtype not in (delivered := _delivered_dtypes(description)):
            takes = f"takes embeddings in {messages.dtype_from_proto(language.dtype)} (--embedding-dtype), but"
            rest = f"delivers {_join_dtypes(delivered)}; {_UPDATE}"
            return Mismatch(f"A language worker {takes} a vision worker {rest}", f"{name} {takes} {vision_name} {rest}")
    return None


def _join_dtypes(numbers: Iterable[int]) -> str:
    return ", ".join(messages.dtype_from_proto(number) for number in numbers if number in KNOWN_DTYPES)


def _different_checkpoints(name: str, workers_by_value: dict[object, list[str]]) -> Mismatch:
    def message(format_value: Callable[[object], str]) -> str:
        values = " and ".join(map(format_value, workers_by_value))
        return f"Workers serve different checkpoints: {name} {values}; start all of them from the same one."

    return Mismatch(message(str), message(lambda value: f"{value} ({_join_names(workers_by_value[value])})"))


def _join_names(workers: Sequence[str]) -> str:
    more = len(workers) - _MAX_NAMED_WORKERS
    return ", ".join(workers[:_MAX_NAMED_WORKERS]) + (f" and {more} more" if more > 0 else "")

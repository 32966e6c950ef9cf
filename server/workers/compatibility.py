"""Whether the workers serve the same checkpoint, and in dtypes that they can exchange."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from common import messages
from protos import embeddings_pb2 as pb
from server.workers.worker import LanguageWorker, VisionWorker

_COMPARED = ("fingerprint", "width", "tile_size", "tokens_per_tile", "compressed_tokens_per_tile", "min_tiles", "max_tiles",
             "thumbnail", "relative_threshold", "absolute_threshold")  # fmt: skip
DELIVERED_DTYPES = [number for number in pb.Dtype.values() if number != pb.DTYPE_UNSPECIFIED]
"""Dtypes that a language worker may compute in: a vision worker casts embeddings to each of them."""

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


def takes_images(language: LanguageWorker, vision_keys: Collection[tuple[object, ...]]) -> bool:
    """Return whether vision workers with these checkpoint keys can encode for a language worker; False while it is down."""
    description = language.description
    return (
        description is not None
        and description.dtype in DELIVERED_DTYPES
        and checkpoint_key(description.checkpoint) in vision_keys
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
    for worker_name, description in descriptions:
        if isinstance(description, pb.LanguageDescription) and description.dtype not in DELIVERED_DTYPES:
            return _unknown_dtype(description.dtype, worker_name)
    return None


def _different_checkpoints(name: str, workers_by_value: dict[object, list[str]]) -> Mismatch:
    def message(format_value: Callable[[object], str]) -> str:
        values = " and ".join(map(format_value, workers_by_value))
        return f"Workers serve different checkpoints: {name} {values}; start all of them from the same one."

    return Mismatch(message(str), message(lambda value: f"{value} ({_join_names(workers_by_value[value])})"))


def _unknown_dtype(number: int, worker_name: str) -> Mismatch:
    known = ", ".join(map(messages.dtype_from_proto, DELIVERED_DTYPES))
    rest = f"computes in dtype number {number}, but vision workers deliver {known}; run the same version of all processes."
    return Mismatch(f"A language worker {rest}", f"{worker_name} {rest}")


def _join_names(workers: Sequence[str]) -> str:
    more = len(workers) - _MAX_NAMED_WORKERS
    return ", ".join(workers[:_MAX_NAMED_WORKERS]) + (f" and {more} more" if more > 0 else "")

"""Turns the features of whole groups into payloads: router, projectors, conversion, and the copy from the device.

On a GPU it has a stream of its own, so that the tower computes the next batch meanwhile.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vision_worker import quantization
from vision_worker.encoder import Encoder, FeatureGroup, GroupEmbedding, concatenate
from vision_worker.models.vir import Policy
from vision_worker.pinned_memory import PinnedMemory

_SHARED_BYTES = 16 << 20
"""Payloads of several images share a buffer up to this size: fewer copies, but an image that waits for a sink keeps it all."""


@dataclass(frozen=True)
class CompleteGroup:
    """A group all of whose tiles have features.

    Attributes:
        features: parts of the features of its distinct tiles, as batches gave them.
        index: for each tile, the index of its features.
        policy: decides which tiles are compressed.
        dtype: dtype of its payloads, one of `quantization.EMBEDDING_DTYPES`.
        tiles_by_image: number of tiles of each image.
    """

    features: Sequence[Tensor]
    index: Sequence[int]
    policy: Policy
    dtype: torch.dtype
    tiles_by_image: Sequence[int]


@dataclass(frozen=True)
class ImageEmbedding:
    """The embedding of one image: `data` is its payload in the requested dtype (`common/embedding.py`).

    `compressed` has an item per tile, thumbnail last. So has `scores`, which is empty if the router did not run.
    """

    data: memoryview
    rows: int
    compressed: list[bool]
    scores: list[float]


@dataclass(frozen=True)
class ProjectedGroup:
    """The embeddings of a group's images in order, and the seconds that routing took."""

    images: list[ImageEmbedding]
    routing_seconds: float


class Projector:
    """Projects groups with an encoder. Not thread-safe."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        device = encoder.placement.device
        # before the tower, whose kernels fill the GPU: there are many small ones here, and each would wait
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._pinned_memory = PinnedMemory()

    def project(self, groups: Sequence[CompleteGroup]) -> list[ProjectedGroup]:
        """Project groups together, whose features the device has computed.

        Payloads may share memory. Code that keeps one for longer than a delivery must copy it.

        Raises:
            InternalError: A value is infinite or NaN, or too large for a narrow dtype, in one of the groups.
        """
        with self._on_stream():
            embeddings = self._encoder.project(
                [FeatureGroup(concatenate(each.features), each.index, each.policy) for each in groups]
            )
            result: dict[int, ProjectedGroup] = {}
            for dtype in {each.dtype for each in groups}:
                members = [i for i, each in enumerate(groups) if each.dtype == dtype]
                images = [_images(groups[i].tiles_by_image, embeddings[i]) for i in members]
                blocks = [block for i in members for block in embeddings[i].blocks]
                rows = [image.rows for group in images for image in group]
                payloads = iter(self._payloads(quantization.convert(torch.cat(blocks), dtype), rows))
                for i, group in zip(members, images, strict=True):
                    result[i] = ProjectedGroup(
                        [replace(image, data=next(payloads)) for image in group], embeddings[i].routing_seconds
                    )
            return [result[i] for i in range(len(groups))]

    def _payloads(self, parts: Sequence[Tensor], rows: Sequence[int]) -> list[memoryview]:
        """Return the payload of each image, from the parts of `quantization.convert` and the images' numbers of rows."""
        # the parts of a narrow payload follow each other, so that each image is copied alone
        max_rows = _SHARED_BYTES // parts[0][:1].nbytes if len(parts) == 1 else 0
        payloads: list[memoryview] = []
        first = 0
        for counts in _runs(rows, max_rows):
            end = first + sum(counts)
            copied = quantization.view(self._copy(quantization.join(parts, slice(first, end))))
            row_bytes, first = len(copied) // sum(counts), end
            for count in counts:
                payloads.append(copied[: count * row_bytes])
                copied = copied[count * row_bytes :]
        return payloads

    def _copy(self, payload: Tensor) -> Tensor:
        """Copy a payload from the device; it is there when the stream is synchronized. One on the CPU is returned itself."""
        if not payload.is_cuda:
            return payload
        return self._pinned_memory.allocate(len(payload)).copy_(payload, non_blocking=True)

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            # payloads are there now, and the memory of features may be used again: it belongs to another stream
            self._stream.synchronize()


def _runs(rows: Sequence[int], max_rows: int) -> Iterator[list[int]]:
    """Divide images, given by their numbers of rows, into runs of at most so many rows together; a larger one is alone."""
    run: list[int] = []
    for count in rows:
        if run and sum(run) + count > max_rows:
            yield run
            run = []
        run.append(count)
    yield run


def _images(tiles_by_image: Sequence[int], embedding: GroupEmbedding) -> list[ImageEmbedding]:
    """Describe the images of a group, without their payloads."""
    result, first = [], 0
    for count in tiles_by_image:
        tiles = slice(first, first + count)
        rows = sum(map(len, embedding.blocks[tiles]))
        result.append(ImageEmbedding(memoryview(b""), rows, embedding.compressed[tiles], embedding.scores[tiles]))
        first += count
    return result

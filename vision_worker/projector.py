"""Turns the features of whole groups into payloads: router, projectors, conversion, and the copy from the device.

On a GPU it has a stream of its own, so that the tower computes the next batch meanwhile.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vision_worker import quantization
from vision_worker.encoder import Encoder, FeatureGroup, GroupEmbedding, concatenate
from vision_worker.models.vir import Policy
from vision_worker.pinned_memory import PinnedMemory


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

        An image's payload has memory of its own, or shares it with other images of its group only, so that a cache may keep it.

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
                blocks = [block for i in members for block in embeddings[i].blocks]
                parts, first_row = quantization.convert(torch.cat(blocks), dtype), 0
                for i in members:
                    images = self._split_by_image(groups[i].tiles_by_image, embeddings[i], parts, first_row)
                    result[i] = ProjectedGroup(images, embeddings[i].routing_seconds)
                    first_row += sum(map(len, embeddings[i].blocks))
            return [result[i] for i in range(len(groups))]

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

    def _split_by_image(
        self, tiles_by_image: Sequence[int], embedding: GroupEmbedding, parts: Sequence[Tensor], first_row: int
    ) -> list[ImageEmbedding]:
        """Split a group by image. Its rows of the parts [all rows, …] of `quantization.convert` begin at `first_row`."""
        result, first_tile = [], 0
        for tile_count in tiles_by_image:
            tiles = slice(first_tile, first_tile + tile_count)
            rows = sum(map(len, embedding.blocks[tiles]))
            payload = self._copy(quantization.join(parts, slice(first_row, first_row + rows)))
            result.append(
                ImageEmbedding(quantization.view(payload), rows, embedding.compressed[tiles], embedding.scores[tiles])
            )
            first_tile, first_row = first_tile + tile_count, first_row + rows
        return result

    def _copy(self, payload: Tensor) -> Tensor:
        """Copy a payload from the device; it is there when the stream is synchronized. One on the CPU is returned itself."""
        if not payload.is_cuda:
            return payload
        return self._pinned_memory.allocate(len(payload)).copy_(payload, non_blocking=True)

"""The images of one Encode call on their way through the batcher: their distinct tiles, then features, then embeddings."""

import asyncio
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vision_worker.deadline import Deadline
from vision_worker.models.vir import Policy
from vision_worker.preprocessing.tiling import Tiles
from vision_worker.projector import CompleteGroup, ImageEmbedding


@dataclass(frozen=True)
class EncodedGroup:
    """The embeddings of a group's images in order, and the seconds spent waiting for a batch, computing and routing."""

    images: list[ImageEmbedding]
    queue_seconds: float
    encode_seconds: float
    route_seconds: float


class TileGroup:
    """One call's images. Equal tiles (blank margins, a repeated image) are computed once.

    That also keeps scores of equal tiles equal: the features of equal pixels may differ by rounding between batches.

    Attributes:
        tiles: the distinct tiles that no batch has taken yet. Their pixels are released with the batch.
        distinct: number of distinct tiles.
        index: for each tile of the group, its index among the distinct tiles.
        tiles_by_image: number of tiles of each image.
    """

    def __init__(self, images: Iterable[Tiles], policy: Policy, dtype: torch.dtype, deadline: Deadline) -> None:
        self.policy, self.dtype, self.deadline = policy, dtype, deadline
        self.future: asyncio.Future[EncodedGroup] = asyncio.get_running_loop().create_future()
        self.arrived, self.started = time.monotonic(), 0.0
        self.features: list[Tensor] = []  # projector thread only
        self.tiles_by_image: list[int] = []
        self.index: list[int] = []
        self.tiles: deque[npt.NDArray[np.uint8]] = deque()
        places: dict[int, int] = {}
        for image in images:
            self.tiles_by_image.append(len(image))
            for value, pixels in zip(image.hashes, image.pixels, strict=True):
                if value not in places:
                    places[value] = len(places)
                    self.tiles.append(pixels)
                self.index.append(places[value])
        self.distinct = len(places)

    def take_features(self) -> CompleteGroup:
        """Return the group with the features of all its tiles, which it no longer references."""
        features, self.features = self.features, []
        return CompleteGroup(features, self.index, self.policy, self.dtype, self.tiles_by_image)

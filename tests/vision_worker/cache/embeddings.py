"""An embedding for the tests of caches."""

import asyncio
import struct

from common.embedding import Header
from protos import vision_pb2 as pb
from vision_worker.cache.embedding_cache import EmbeddingCache

HEADER = Header("key", "f" * 64, "float32", 3, 2)
VALUES = struct.pack("<6f", *range(6))
IMAGE = pb.EncodedImage(key="key", tokens=3, columns=1, rows=1, compressed=[True], scores=[0.5])
EXPECTED = Header("key", "f" * 64, "float32", 0, 2)
"""What is looked up: the number of rows is not known then."""


async def writes_done(embeddings: EmbeddingCache) -> None:
    async with asyncio.timeout(5):
        while embeddings._writes:
            await asyncio.sleep(0.001)

"""Keys under which embeddings are cached and shared: digests that the vision worker computes over what determines them.

The key that a caller sends with an image only names the embedding in the sink. A key that is known to others can therefore
neither read nor plant an embedding here.
"""

import asyncio
import hashlib
from collections.abc import Sequence

from common import errors
from common.digest import digest
from vision_worker.encode_request import ParsedRequest


async def embedding_keys(request: ParsedRequest, fingerprint: str) -> list[str]:
    """Return a key for each image of a call. Equal keys have equal embeddings, of callers of one scope.

    The images of a call are routed together, so each key depends on all of them.

    Args:
        request: The call.
        fingerprint: Fingerprint of the checkpoint.

    Raises:
        InvalidRequest: Two different files of the call have the same key.
    """
    files = await asyncio.to_thread(_file_digests, request)  # up to 256 MiB
    _check_names([image.key for image in request.images], files)
    setting = repr((request.tiling.min_tiles, request.tiling.max_tiles, request.policy))
    group = digest(fingerprint.encode(), request.scope, request.dtype.encode(), setting.encode(), *files)
    return [digest(group, str(i).encode()).hex() for i in range(len(files))]


def _file_digests(request: ParsedRequest) -> list[bytes]:
    return [hashlib.sha256(image.data).digest() for image in request.images]


def _check_names(names: Sequence[str], files: Sequence[bytes]) -> None:
    first: dict[str, int] = {}
    for i, name in enumerate(names):
        other = first.setdefault(name, i)
        if files[i] != files[other]:
            raise errors.InvalidRequest(
                f"images[{i}] has the key of images[{other}], but is another file", param=f"images[{i}]"
            )

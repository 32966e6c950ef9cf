"""Loading of the images and videos of a request as image files."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from common import errors
from common.tasks import gather_or_cancel
from server.apis.request import ImagePart, ParsedRequest, format_path
from server.media.fetch import MediaFetcher
from server.media.image_file import ImageFile
from server.request_context import unbounded

_MAX_PARALLEL_FETCHES = 8
_MAX_HASHED_CHARACTERS = 8192
"""Length of a URL from which on it is the image itself, since no URL that is fetched is longer."""


class MediaLoader:
    """Loads all images of a request."""

    def __init__(self, fetcher: MediaFetcher, max_total_bytes: int) -> None:
        self._fetcher = fetcher
        self._max_total_bytes = max_total_bytes

    async def load(
        self, request: ParsedRequest, reserve: Callable[[int], None] = unbounded
    ) -> tuple[ParsedRequest, list[ImageFile]]:
        """Load the images, and replace each video by its frames. A URL that occurs twice is fetched once, for its first image.

        Args:
            request: The request.
            reserve: Reserves memory for the bytes that are fetched.

        Returns:
            The request with one `ImagePart` for each image file, and the files in the same order.

        Raises:
            InvalidRequest: An image or video cannot be fetched or decoded, or is too large. `param` is its location.
            Overloaded: The memory is not left.
        """
        keys = [_source(image, position) for position, image in enumerate(request.images)]
        sources: dict[tuple[str | int, int], ImagePart] = {}
        for key, image in zip(keys, request.images, strict=True):
            sources.setdefault(key, image)
        loaded = dict(zip(sources, await self._load_all(list(sources.values()), reserve), strict=True))
        files = [loaded[key] for key in keys]
        images = [
            part for image, image_files in zip(request.images, files, strict=True) for part in _frame_parts(image, image_files)
        ]
        return replace(request, images=images), [file for image_files in files for file in image_files]

    async def _load_all(self, images: Sequence[ImagePart], reserve: Callable[[int], None]) -> list[list[ImageFile]]:
        """Load each image, or the frames of each video; together they may be as large as a body."""
        slots, remaining = asyncio.Semaphore(_MAX_PARALLEL_FETCHES), self._max_total_bytes

        async def load_one(image: ImagePart) -> list[ImageFile]:
            nonlocal remaining
            async with slots:
                files = await self._load_files(image, reserve, len(images))
            remaining -= sum(len(file.data) for file in files)
            if remaining < 0:
                raise errors.ImageTooLarge(
                    f"The images of the request exceed {self._max_total_bytes} bytes in total.", param=str(image.path[0])
                )
            return files

        return await gather_or_cancel(*map(load_one, images))

    async def _load_files(self, image: ImagePart, reserve: Callable[[int], None], among: int) -> list[ImageFile]:
        """Load an image, one `among` several, or the frames of a video. Errors name its location."""
        try:
            if image.frames:
                return await self._fetcher.load_frames(image.url, image.frames, reserve)
            return [await self._fetcher.load(image.url, reserve, among)]
        except errors.InvalidRequest as error:
            raise error.at(format_path(image.path)) from None


def _source(image: ImagePart, position: int) -> tuple[str | int, int]:
    """Return what tells an image or a video apart from those with another source: its URL, or its position in the request.

    To hash the text of a large image takes longer than to decode it. An image that occurs twice is encoded once all the same.
    """
    is_large_image = len(image.url) > _MAX_HASHED_CHARACTERS and not image.frames
    return position if is_large_image else image.url, image.frames


def _frame_parts(image: ImagePart, files: Sequence[ImageFile]) -> list[ImagePart]:
    """Return an image as it is, and a video as its frames with the labels that InternVL is trained with."""
    if not image.frames:
        return [image]
    return [replace(image, frames=0, label=f"Frame{number}: ") for number in range(1, len(files) + 1)]

"""Loading of all images of a request: order, equal URLs, frames of videos, and the total size."""

from collections.abc import Callable
from typing import Any

import pytest

from common import errors
from protos import vision_pb2 as pb
from server.apis.image_options import ImageOptions
from server.apis.request import ImagePart, ParsedRequest
from server.media.image_file import ImageFile
from server.media.loader import MediaLoader
from tests.server.fakes.requests import image_file

MAX_PIXELS = 100_000
OPTIONS = ImageOptions("images[0]", "auto", None, pb.Router())


def file_of(url: str) -> bytes:
    """Return an image of its own for a URL, or for a URL and the number of a frame."""
    return image_file(sum(url.encode()), (len(url) + 1, 4))


class FakeFetcher:
    """Loads an image for each URL, and one for each frame. Records the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    async def load(self, url: str, reserve: Callable[[int], None], among: int) -> ImageFile:
        self.calls.append((url, 0))
        if url == "invalid":
            raise errors.InvalidImage("not an image")
        return ImageFile.examine(file_of(url), MAX_PIXELS)

    async def load_frames(self, url: str, count: int, reserve: Callable[[int], None]) -> list[ImageFile]:
        self.calls.append((url, count))
        if url == "invalid":
            raise errors.InvalidImage("not an image")
        return [ImageFile.examine(file_of(f"{url}-{i}"), MAX_PIXELS) for i in range(count)]


def make_loader(max_total_bytes: int = 10_000) -> tuple[MediaLoader, FakeFetcher]:
    fetcher: Any = FakeFetcher()
    return MediaLoader(fetcher, max_total_bytes), fetcher


def make_request(*media: tuple[str, int]) -> ParsedRequest:
    """Return a request with these URLs and numbers of frames, 0 for an image."""
    return ParsedRequest(b"", {}, [ImagePart(("images", i), url, OPTIONS, frames) for i, (url, frames) in enumerate(media)])


async def test_files_are_in_the_order_of_the_images_and_equal_urls_are_loaded_once() -> None:
    loader, fetcher = make_loader()
    request = make_request(("a", 0), ("b", 0), ("a", 0))
    loaded, files = await loader.load(request)
    assert [file.data for file in files] == [file_of(url) for url in ("a", "b", "a")]
    assert len({file.digest for file in files}) == 2
    assert loaded.images == request.images
    assert sorted(fetcher.calls) == [("a", 0), ("b", 0)]


async def test_large_images_in_bodies_keep_their_order_and_a_video_is_loaded_once() -> None:
    loader, fetcher = make_loader(100_000)
    long = "x" * 10_000
    _, files = await loader.load(make_request((long, 0), ("a", 0), (long, 0), (long, 2), ("b", 0), (long, 2)))
    frames = [file_of(f"{long}-{i}") for i in range(2)]
    expected = [file_of(long), file_of("a"), file_of(long), *frames, file_of("b"), *frames]
    assert [file.data for file in files] == expected
    assert fetcher.calls.count((long, 2)) == 1


async def test_a_video_becomes_labelled_frames_at_its_path() -> None:
    loader, _ = make_loader()
    loaded, files = await loader.load(make_request(("a", 0), ("v", 2), ("b", 0)))
    assert [file.data for file in files] == [file_of(url) for url in ("a", "v-0", "v-1", "b")]
    assert [image.path for image in loaded.images] == [("images", 0), ("images", 1), ("images", 1), ("images", 2)]
    assert [image.label for image in loaded.images] == ["", "Frame1: ", "Frame2: ", ""]
    assert not any(image.frames for image in loaded.images)


async def test_a_url_is_loaded_for_each_number_of_frames() -> None:
    loader, fetcher = make_loader()
    _, files = await loader.load(make_request(("v", 1), ("v", 2), ("v", 1)))
    assert [file.data for file in files] == [file_of(url) for url in ("v-0", "v-0", "v-1", "v-0")]
    assert sorted(fetcher.calls) == [("v", 1), ("v", 2)]


async def test_the_total_size_is_limited() -> None:
    request = make_request(("abc", 0), ("de", 0))
    size = len(file_of("abc")) + len(file_of("de"))
    await make_loader(size)[0].load(request)
    with pytest.raises(errors.ImageTooLarge, match=f"exceed {size - 1} bytes in total") as error_info:
        await make_loader(size - 1)[0].load(request)
    assert error_info.value.param == "images"


@pytest.mark.parametrize("frames", [0, 2])
async def test_an_error_names_the_first_image_that_has_the_url(frames: int) -> None:
    with pytest.raises(errors.InvalidImage, match=r"^images\[1\]: not an image$") as error_info:
        await make_loader()[0].load(make_request(("a", 0), ("invalid", frames), ("invalid", frames)))
    assert error_info.value.param == "images[1]"


async def test_sizes_are_read_from_the_headers() -> None:
    _, files = await make_loader()[0].load(make_request(("a", 0), ("abc", 0), ("v", 1)))
    assert [file.size for file in files] == [(2, 4), (4, 4), (4, 4)]

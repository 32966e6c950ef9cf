"""Files made to exhaust a decoder: each costs its caller an error, and nobody else anything."""

import asyncio
import functools
import io
import os
import random
import signal
import struct
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.server.fakes.requests import chat, data_url, image_part, text_part
from tests.server.fakes.stack import Stack
from tests.server.fakes.waiting import wait_until
from tests.trouble.media_stack import DATA, DecodingVisionWorker, start_media_stack
from tests.videos import slow_video

JPEG = (DATA / "golden/images/hd_1920x1080.jpg").read_bytes()
LONG_SECONDS = 600.0


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def repeat_last_scan(count: int, side: int = 8000) -> bytes:
    """Return a progressive JPEG whose last scan occurs again and again: 0.09 s of CPU time each at 8000 × 8000."""
    file = save(Image.new("RGB", (side, side), (1, 2, 3)), "JPEG", progressive=True)
    last = file[file.rindex(b"\xff\xda") : -2]
    return file[:-2] + last * count + b"\xff\xd9"


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_chunks(*chunks: bytes) -> bytes:
    file = save(Image.new("RGB", (64, 64)), "PNG")
    return file[:33] + b"".join(chunks) + file[33:]


def with_segments(segments: bytes) -> bytes:
    return JPEG[:2] + segments + JPEG[2:]


def frames(kind: str) -> bytes:
    """Return an animation of 1000 frames, of which the first one counts."""
    first, *others = (Image.new("RGB", (8, 8), (i % 256, i // 4, 0)) for i in range(1000))
    return save(first, kind, save_all=True, append_images=others)


def exif_loop() -> bytes:
    """Return EXIF data whose directory refers to itself."""
    directory = struct.pack("<HHHIII", 1, 0x8769, 4, 1, 8, 8)
    data = b"Exif\0\0" + b"II*\0" + struct.pack("<I", 8) + directory
    return b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data


REFUSED = {
    "JPEG of 600 scans": (lambda: repeat_last_scan(600, 2000), "64 scans"),
    "JPEG of a million comments": (lambda: with_segments(b"\xff\xfe\x00\x02" * 1_000_000), "10000 segments"),
    "JPEG of a million comments after its pixels": (lambda: JPEG[:-2] + b"\xff\xfe\x00\x02" * 1_000_000, "10000 segments"),
    "JPEG of 200 KB between two segments": (lambda: JPEG[:20] + bytes(200_000) + JPEG[20:], "damaged JPEG"),
    "GIF of 100,000 comments": (
        lambda: b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0, 0, 0) + b"!\xfe\x01a\0" * 100_000, "50000 blocks"
    ),
    "PNG of 10^10 pixels": (lambda: with_size(100_000, 100_000), "64000000"),
    "PNG without pixels": (lambda: with_size(8000, 8000), "cannot be decoded"),
    "TIFF": (lambda: save(Image.new("RGB", (8, 8)), "TIFF"), "supported format"),
    "ICO": (lambda: save(Image.new("RGB", (8, 8)), "ICO"), "supported format"),
    "AVIF": (lambda: b"\0\0\0\x20ftypavif" + bytes(100), "supported format"),
}  # fmt: skip

SERVED = {
    "JPEG of 9000 comments": lambda: with_segments(b"\xff\xfe\x00\x02" * 9000),
    "JPEG with an EXIF loop": lambda: with_segments(exif_loop()),
    "PNG with a text of 64 MB": lambda: with_chunks(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(64 << 20)))),
    "PNG with a profile of 64 MB": lambda: with_chunks(chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(64 << 20)))),
    "PNG of 5000 chunks": lambda: with_chunks(*[chunk(b"teSt", b"")] * 5000),
    "GIF of 1000 frames": lambda: frames("GIF"),
    "APNG of 1000 frames": lambda: frames("PNG"),
    "WebP of 1000 frames": lambda: frames("WEBP"),
    "MPO": lambda: frames_of_mpo(),
}  # fmt: skip


def with_size(width: int, height: int) -> bytes:
    file = save(Image.new("RGB", (64, 64)), "PNG")
    return file[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + file[33:]


def frames_of_mpo() -> bytes:
    images = [Image.new("RGB", (64, 64), (i, 0, 0)) for i in range(20)]
    return save(images[0], "MPO", save_all=True, append_images=images[1:])


class Server:
    """A gateway and a decoding vision worker."""

    def __init__(self, stack: Stack, vision: DecodingVisionWorker) -> None:
        self.stack, self.vision = stack, vision
        self._good = random.Random(0)

    async def assert_serves(self) -> None:
        """Assert that an image is served that no cache has."""
        file = save(Image.new("RGB", (64, 64), tuple(self._good.randbytes(3))), "PNG")
        response = await self.stack.chat(image_part(file), text_part("?"))
        assert response.status == 200, response.body

    async def post(self, file: bytes) -> Any:
        """Send an image after a text, and return the response."""
        return await self.stack.chat(text_part("a"), image_part(file))

    async def assert_refused(self, file: bytes, reason: str) -> None:
        """Assert that a file is refused with 400, naming its place, and that it is counted once."""
        before = await self.stack.metric('dvd_errors_total{code="invalid_image"')
        too_large = await self.stack.metric('dvd_errors_total{code="image_too_large"')
        response = await self.post(file)
        assert response.status == 400, response.body
        assert response.error["code"] in ("invalid_image", "image_too_large")
        assert response.error["param"] == "messages[0].content[1]"
        assert reason in response.error["message"]
        assert (
            await self.stack.metric('dvd_errors_total{code="invalid_image"')
            + await self.stack.metric('dvd_errors_total{code="image_too_large"')
            == before + too_large + 1
        )

    def ends(self, reason: str) -> float:
        """Return how many decoder processes of the vision worker ended for this reason."""
        return self.vision.metrics.registry.get_sample_value("dvd_decoder_ends_total", {"reason": reason}) or 0

    async def start_decoding(self, file: bytes) -> tuple[asyncio.StreamWriter, int]:
        """Send an image that takes long, and return its connection and the process that decodes it."""
        before = self.vision.processes.cpu_seconds()
        _, writer = await self.stack.start_chat(chat(image_part(file)))
        await wait_until(lambda: self.vision.processes.cpu_seconds() > before + 0.2, "it is being decoded")
        return writer, max(self.vision.processes.pids, key=cpu_seconds)


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def cpu_seconds(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])


@pytest.fixture
def serve(tmp_path: Path) -> Callable[..., Any]:
    def start(decode_timeout: float = LONG_SECONDS, memory_bytes: int = 2 << 30) -> Any:
        vision = DecodingVisionWorker(f"unix:{tmp_path}/vision", decode_timeout, memory_bytes)
        return vision, start_media_stack(tmp_path, vision)

    return start


@pytest.fixture
async def server(serve: Callable[..., Any]) -> AsyncIterator[Server]:
    vision, running = serve()
    async with running as (stack, _):
        yield Server(stack, vision)


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    folder = tmp_path_factory.mktemp("shared")
    vision = DecodingVisionWorker(f"unix:{folder}/vision", LONG_SECONDS)
    async with start_media_stack(folder, vision) as (stack, _):
        yield Server(stack, vision)


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
async def test_a_hostile_image_is_refused(shared: Server, make: Callable[[], bytes], reason: str) -> None:
    await asyncio.gather(shared.assert_refused(make(), reason), shared.assert_serves())
    await shared.assert_serves()
    assert shared.ends("crash") == shared.ends("cpu") == 0


@pytest.mark.parametrize("make", SERVED.values(), ids=SERVED)
async def test_an_image_with_much_beside_its_pixels_is_served(shared: Server, make: Callable[[], bytes]) -> None:
    response, _ = await asyncio.gather(shared.post(make()), shared.assert_serves())
    assert response.status == 200, response.body
    assert shared.ends("crash") == shared.ends("cpu") == 0


async def test_a_jpeg_cut_anywhere_is_refused_or_served(shared: Server) -> None:
    file = save(Image.radial_gradient("L").resize((64, 64)), "JPEG", progressive=True)
    for end in range(1, len(file), len(file) // 25):
        assert (await shared.post(file[:end])).status in (200, 400), end
    await shared.assert_serves()
    assert shared.ends("crash") == 0


async def test_an_image_that_takes_too_long_ends_its_process_and_no_other(serve: Callable[..., Any]) -> None:
    vision, running = serve(decode_timeout=1)
    async with running as (stack, _):
        server = Server(stack, vision)
        await server.assert_serves()
        await asyncio.gather(server.assert_refused(repeat_last_scan(50), "--decode-timeout"), server.assert_serves())
        assert server.ends("cpu") + server.ends("time") == 1
        await server.assert_serves()


async def test_a_good_image_is_served_however_slow_the_machine_is(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes many times the time after which its process must have made progress."""
    monkeypatch.setattr("common.decoder_processes._WALL_FACTOR", 1e-3)
    monkeypatch.setattr("common.decoder_processes._MIN_CPU_SHARE", 0.0)
    vision, running = serve(decode_timeout=20)
    async with running as (stack, _):
        server = Server(stack, vision)
        response = await server.post(save(Image.new("RGB", (8000, 8000), (1, 2, 3)), "PNG"))
        assert response.status == 200, response.body
        assert sum(server.ends(reason) for reason in ("cpu", "time", "crash", "memory")) == 0
        await server.assert_serves()


async def test_an_image_that_needs_too_much_memory_is_refused(serve: Callable[..., Any]) -> None:
    vision, running = serve(memory_bytes=64 << 20)
    async with running as (stack, _):
        server = Server(stack, vision)
        bomb = save(Image.new("RGB", (8000, 8000)), "PNG")
        await asyncio.gather(server.assert_refused(bomb, "--decode-memory"), server.assert_serves())
        assert server.ends("memory") >= 1
        await server.assert_serves()


async def test_the_process_of_a_caller_that_leaves_is_free_at_once(server: Server) -> None:
    await server.assert_serves()
    bomb = repeat_last_scan(50)
    descriptors = len(os.listdir("/proc/self/fd"))
    for count in range(1, 4):
        writer, pid = await server.start_decoding(bomb)
        writer.close()
        await wait_until(functools.partial(is_gone, pid), "its process has ended")
        await wait_until(lambda: server.vision.threads.is_idle, "its thread is free")
        assert server.ends("abandoned") == count
        await server.assert_serves()
    await server.stack.wait_until_idle()
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 5


async def test_images_do_not_wait_for_those_that_take_long(server: Server) -> None:
    bomb = repeat_last_scan(50)
    writers = [(await server.start_decoding(bomb + bytes(i)))[0] for i in range(2)]  # different files, for both threads
    await server.assert_serves()
    for writer in writers:
        writer.close()
    await wait_until(lambda: server.vision.threads.is_idle, "all threads are free")


async def test_a_process_that_is_killed_is_replaced_and_the_image_served(server: Server) -> None:
    await server.assert_serves()
    for pid in server.vision.processes.pids:
        os.kill(pid, signal.SIGKILL)
    await server.assert_serves()
    assert server.ends("crash") == 1


async def test_an_image_whose_process_is_killed_twice_is_refused(server: Server) -> None:
    request = asyncio.create_task(server.post(repeat_last_scan(50)))
    killed = set[int]()

    async def kill() -> None:
        busy = [pid for pid in server.vision.processes.pids if pid not in killed and cpu_seconds(pid) > 20]
        for pid in busy:
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)

    async with asyncio.timeout(120):
        while not request.done():
            await kill()
            await asyncio.sleep(0.02)
    response = await request
    assert (response.status, response.error["code"]) == (400, "invalid_image")
    assert server.ends("crash") == len(killed) == 2
    await server.assert_serves()


async def test_the_process_of_a_video_ends_with_its_caller(server: Server) -> None:
    await server.assert_serves()
    video = {"type": "video_url", "video_url": {"url": data_url(slow_video(), "video/mp4")}}
    _, writer = await server.stack.start_chat(chat(video))

    async def is_started() -> bool:
        return await server.stack.metric("dvd_decoder_starts_total") == 1

    await wait_until(is_started, "the video is being decoded")
    writer.close()
    await server.stack.wait_for_metric('dvd_decoder_ends_total{reason="abandoned"', 1)
    await server.assert_serves()

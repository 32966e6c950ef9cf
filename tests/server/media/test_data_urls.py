"""Images in `data:` URLs: the forms that are decoded, those that are rejected, and the size limit."""

import base64
import hashlib
from urllib.parse import quote

import pytest

from common import errors
from server.media.image_file import ImageFile
from tests.server.fakes.requests import data_url
from tests.server.media.helpers import PNG, open_fetcher


def to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


FILE = PNG + b"\xfb\xef\xbe\xff" * 3 + bytes(2 - (len(PNG) + 1) % 3)  # its base64 has all of + / =
assert {"+", "/", "="} <= set(to_base64(FILE))
FORMS = {
    "standard": f"data:image/png;base64,{to_base64(FILE)}",
    "wrong media type": f"data:image/jpeg;base64,{to_base64(FILE)}",
    "media type of a text": f"data:text/plain;base64,{to_base64(FILE)}",
    "no media type": f"data:;base64,{to_base64(FILE)}",
    "parameters": f"data:image/png;name=a.png;charset=utf-8;base64,{to_base64(FILE)}",
    "parameter with commas": f"data:video/webm;codecs=vp9,opus;base64,{to_base64(FILE)}",
    "parameter with quoted commas": f'data:image/png;name="a,b;c";base64,{to_base64(FILE)}',
    "white space around it": f" \r\n data:image/png;base64,{to_base64(FILE)}\n",
    "upper case": f"DATA:IMAGE/PNG;BASE64,{to_base64(FILE)}",
    "line breaks": "data:image/png;base64," + base64.encodebytes(FILE).decode(),
    "CRLF line breaks": "data:image/png;base64," + base64.encodebytes(FILE).decode().replace("\n", "\r\n"),
    "spaces": "data:image/png;base64, " + " ".join(to_base64(FILE)),
    "percent-encoded": "data:image/png;base64," + quote(to_base64(FILE), safe=""),
    "URL-safe": "data:image/png;base64," + base64.urlsafe_b64encode(FILE).decode(),
    "no padding": f"data:image/png;base64,{to_base64(FILE).rstrip('=')}",
    "too much padding": f"data:image/png;base64,{to_base64(FILE)}====",
}


@pytest.mark.parametrize("form", ["standard", "line breaks", "URL-safe", "no padding", "percent-encoded"])
@pytest.mark.parametrize("extra_bytes", [0, 1, 2])
async def test_large_files_are_decoded_in_all_forms(form: str, extra_bytes: int) -> None:
    file = FILE + bytes(i % 251 for i in range((3 << 15) - len(FILE) + extra_bytes))
    payloads = {
        "standard": to_base64(file), "line breaks": base64.encodebytes(file).decode(),
        "URL-safe": base64.urlsafe_b64encode(file).decode(), "no padding": to_base64(file).rstrip("="),
        "percent-encoded": quote(to_base64(file), safe=""),
    }  # fmt: skip
    async with open_fetcher() as fetcher:
        assert (await fetcher.load(f"data:image/png;base64,{payloads[form]}")).data == file


async def test_padding_inside_the_data_is_rejected_at_any_position() -> None:
    large = to_base64(FILE + bytes(3 << 15))
    async with open_fetcher() as fetcher:
        for position in (8, 1 << 10, 1 << 16, len(large) - 4):
            with pytest.raises(errors.InvalidImage, match="not valid base64"):
                await fetcher.load(f"data:image/png;base64,{large[: position - 2]}=={large[position:]}")


@pytest.mark.parametrize("size", [1, 70_000])
async def test_a_file_is_examined_whatever_its_size(size: int) -> None:
    file = PNG + bytes(size)
    async with open_fetcher() as fetcher:
        assert await fetcher.load(data_url(file)) == ImageFile(file, hashlib.sha256(file).digest(), (8, 8))
        with pytest.raises(errors.InvalidImage, match="not an image"):
            await fetcher.load(data_url(bytes(size)))


@pytest.mark.parametrize("url", FORMS.values(), ids=FORMS)
async def test_forms_that_clients_send_are_decoded(url: str) -> None:
    async with open_fetcher() as fetcher:
        assert (await fetcher.load(url)).data == FILE


INVALID_FORMS = {
    "no comma": "data:image/png;base64",
    "not base64": "data:image/png," + quote(PNG),
    "base64 not last": f"data:base64;image/png,{to_base64(PNG)}",
    "base64 in the payload only": f"data:image/png,{'x' * 2000};base64,{to_base64(PNG)}",
    "empty payload": "data:image/png;base64,",
    "only padding": "data:image/png;base64,====",
    "one character": "data:image/png;base64,A",
    "padding inside": f"data:image/png;base64,{to_base64(PNG)[:8]}=={to_base64(PNG)[8:]}",
    "not the alphabet": "data:image/png;base64,!!!!",
    "not ASCII": "data:image/png;base64,éééé",
    "surrogate": "data:image/png;base64,\ud800",
    "NUL": "data:image/png;base64,\0\0\0\0",
    "base64 of base64": f"data:image/png;base64,{to_base64(to_base64(PNG).encode())}",
    "base64 of a URL": f"data:image/png;base64,{to_base64(b'https://example.org/a.png')}",
    "base64 of a text": f"data:image/png;base64,{to_base64(b'hello')}",
}


@pytest.mark.parametrize("url", INVALID_FORMS.values(), ids=INVALID_FORMS)
async def test_invalid_forms_are_rejected(url: str) -> None:
    async with open_fetcher() as fetcher:
        with pytest.raises(errors.InvalidImage) as error_info:
            await fetcher.load(url)
    assert len(str(error_info.value)) < 300


@pytest.mark.parametrize("limit", [len(PNG) - 1, len(PNG) - 2, len(PNG) // 2, 1])
async def test_the_size_limit_is_exact(limit: int) -> None:
    async with open_fetcher(max_image_bytes=len(PNG)) as fetcher:
        assert (await fetcher.load(data_url(PNG))).data == PNG
    async with open_fetcher(max_image_bytes=limit) as fetcher:
        with pytest.raises(errors.ImageTooLarge, match=f"exceeds {limit} bytes"):
            await fetcher.load(data_url(PNG))

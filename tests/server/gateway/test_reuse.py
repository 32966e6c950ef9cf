"""Equal images are encoded once, and the response says which cache had an image."""

import asyncio

from tests.server.fakes.file_server import file_server
from tests.server.fakes.handlers import in_turn, respond_with
from tests.server.fakes.requests import image_part, text_part
from tests.server.fakes.stack import Stack
from tests.server.gateway.helpers import A, B


async def test_the_response_says_which_cache_had_an_image(stack: Stack) -> None:
    await stack.chat(image_part(A))
    stack.vision.cached = True
    await stack.chat(image_part(B))
    stack.vision.cached = False
    stack.sink.rows.pop(stack.vision.calls[-1].images[0].key)
    tiles = await stack.metric("dvd_tiles_total")
    stack.vision.cached = True
    response = await stack.chat(image_part(A), image_part(B), image_part(B))
    assert response.headers["X-DvD-Images"].endswith("reused=1; shared=2; encoded=0")
    assert await stack.metric("dvd_tiles_total") == tiles, "cached images are not counted as encoded"


async def test_a_url_whose_image_changed_is_encoded_again(stack: Stack) -> None:
    async with file_server(a=in_turn(respond_with(A), respond_with(B))) as url:
        for _ in range(2):
            assert (await stack.chat(image_part(f"{url}/a"))).status == 200
    assert stack.vision.images == [A, B]


async def test_a_hundred_concurrent_equal_images_are_encoded_once(stack: Stack) -> None:
    stack.vision.may_encode.clear()
    requests = [asyncio.create_task(stack.chat(image_part(A), text_part(str(i)))) for i in range(100)]
    await stack.wait_for_metric("dvd_encodes_joined_total", 99)
    stack.vision.may_encode.set()
    assert {response.status for response in await asyncio.gather(*requests)} == {200}
    assert len(stack.vision.calls) == 1
    assert len(stack.engine.requests) == 100
    for _ in range(3):
        assert (await stack.chat(image_part(A))).headers["X-DvD-Images"].endswith("reused=1; shared=0; encoded=0")
    assert len(stack.vision.calls) == 1, "later requests find the embedding"

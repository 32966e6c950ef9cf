"""POST /v1/images/tokens: the number of visual tokens before a request is made."""

from pathlib import Path

import pytest

from tests.server.fakes.requests import chat, data_url, image_file, image_part
from tests.server.fakes.stack import Stack, start_stack
from tests.server.fakes.vision_worker import checkpoint_description, visual_token_count
from tests.server.fakes.waiting import wait_until
from tests.server.gateway.helpers import A, B, assert_serves_images, message_content


async def test_token_counts_are_computed_without_encoding(tmp_path: Path) -> None:
    async with start_stack(tmp_path, max_tiles=40) as stack:
        wide = image_file(1, (1300, 800))
        images = [{"url": data_url(wide), **options} for options in ({}, {"detail": "low"}, {"max_dynamic_patch": 2})]
        response = await stack.post(
            {"images": [*images, {"url": data_url(A), "vir": {"mode": "all"}}]}, path="/v1/images/tokens"
        )
        assert response.status == 200, response.body
        assert [image["tiles"] for image in response.json["images"]] == [
            {"columns": 3, "rows": 2, "thumbnail": True, "total": 7},
            {"columns": 1, "rows": 1, "thumbnail": False, "total": 1},
            {"columns": 2, "rows": 1, "thumbnail": True, "total": 3},
            {"columns": 1, "rows": 1, "thumbnail": False, "total": 1},
        ]
        first, last = response.json["images"][0], response.json["images"][3]
        assert (first["width"], first["height"], first["mode"], last["mode"]) == (1300, 800, "auto", "all")
        assert first["tokens"] == {"off": 7 * 256, "all": 7 * 64, "auto": [7 * 64, 7 * 256]}
        assert response.json["total"] == {
            "tiles": 12,
            "tokens": {"off": 12 * 256, "all": 12 * 64, "auto": [12 * 64, 12 * 256]},
        }
        assert (stack.vision.calls, stack.engine.requests, stack.sink.rows) == ([], [], {})
        assert "X-DvD-Images" not in response.headers
        await stack.wait_until_idle()


async def test_a_checkpoint_without_a_router_has_no_compressed_count(stack: Stack) -> None:
    plain = checkpoint_description(compressed_tokens_per_tile=0, thumbnail=False, tile_size=64, min_tiles=2)
    stack.vision.checkpoint, stack.sink.checkpoint = plain, plain

    async def has_no_router() -> bool:
        response = await stack.post(chat(image_part(image_file(2, (200, 100)))), path="/v1/images/tokens")
        return bool(response.status == 200 and response.json["images"][0]["tokens"]["all"] is None)

    await wait_until(has_no_router, "the gateway has read the other description")
    response = await stack.post(chat(image_part(image_file(2, (200, 100)))), path="/v1/images/tokens")
    (image,) = response.json["images"]
    assert image["tiles"] == {"columns": 4, "rows": 2, "thumbnail": False, "total": 8}
    assert image["tokens"] == {"off": 2048, "all": None, "auto": [2048, 2048]}
    assert response.json["total"]["tokens"] == {"off": 2048, "all": None, "auto": [2048, 2048]}


@pytest.mark.parametrize("scope", ["image", "request"])
async def test_a_routed_count_is_reused_by_the_request_that_follows(tmp_path: Path, scope: str) -> None:
    async with start_stack(tmp_path, router_scope=scope) as stack:
        body = {**chat(image_part(A), image_part(B)), "route": True}
        for _ in range(2):
            response = await stack.post(body, path="/v1/images/tokens")
            assert response.status == 200, response.body
            routed = [image["routed"] for image in response.json["images"]]
            assert routed == [{"tokens": visual_token_count(image), "compressed": [False, True]} for image in (A, B)]
            assert response.json["total"]["routed"] == {
                "tokens": visual_token_count(A) + visual_token_count(B),
                "compressed": 2,
            }
        assert all(call.dry_run and not call.deliver_to for call in stack.vision.calls)
        assert sorted(stack.vision.images) == sorted([A, B]), "known decisions are not requested again"
        assert (stack.engine.requests, stack.sink.rows) == ([], {})
        keys = {image.key for call in stack.vision.calls for image in call.images}
        del body["route"]
        assert (await stack.post(body)).status == 200
        assert {part["uuid"] for part in message_content(stack)} == keys, "the request that follows uses the same keys"


async def test_a_request_without_images_has_no_visual_tokens(shared_stack: Stack) -> None:
    response = await shared_stack.post({**chat("a"), "route": True}, path="/v1/images/tokens")
    assert (response.status, response.json["images"]) == (200, [])
    assert response.json["total"]["tiles"] == 0


async def test_an_image_that_cannot_be_measured_is_rejected(shared_stack: Stack) -> None:
    for body, param in (
        ({"images": [{"url": "file:///etc/passwd"}]}, "images[0]"),
        ({"images": [{"url": data_url(b"text")}]}, "images[0]"),
        ({"images": [{"url": data_url(A), "max_dynamic_patch": 13}]}, "images[0].max_dynamic_patch"),
        ({"images": [{"url": data_url(A)}], "model": "other"}, "model"),
        ({"images": []}, "images"),
    ):
        response = await shared_stack.post(body, path="/v1/images/tokens")
        assert response.status in (400, 404)
        assert response.error["param"] == param
    await assert_serves_images(shared_stack)

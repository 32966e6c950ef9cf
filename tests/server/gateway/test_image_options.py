"""Per-image options: tiling, router and their limits by the operator."""

from pathlib import Path
from typing import Any

import pytest

from common import errors
from protos import vision_pb2 as pb
from tests.server.fakes.requests import chat, data_url, image_file, image_part, text_part
from tests.server.fakes.stack import Stack, start_stack
from tests.server.fakes.vision_worker import visual_token_count
from tests.server.gateway.helpers import A, B, assert_serves_images, message_content


async def test_each_router_setting_has_its_own_embedding_and_report(stack: Stack) -> None:
    settings = [None, {"mode": "off"}, {"mode": "all"}, {"relative_threshold": 0.25}]
    for reused in (0, 1):
        for vir, compressed in zip(settings, (1, 0, 2, 1), strict=True):
            response = await stack.chat(image_part(A), vir=vir)
            report = f"images=1; tiles=2; compressed={compressed}; tokens={visual_token_count(A)}; reused={reused}; shared=0"
            report += f"; encoded={1 - reused}"
            assert (response.status, response.headers["X-DvD-Images"]) == (200, report)
            assert "vir" not in stack.engine.last_json()
    modes = [(call.router.mode, call.router.HasField("relative_threshold")) for call in stack.vision.calls]
    assert modes == [(pb.Router.AUTO, False), (pb.Router.OFF, False), (pb.Router.ALL, False), (pb.Router.AUTO, True)]
    assert len({call.images[0].key for call in stack.vision.calls}) == len(settings)
    assert (await stack.chat("a", vir={"mode": "off"})).status == 200
    assert "vir" not in stack.engine.last_json()


@pytest.mark.parametrize(
    ("options", "router"),
    [
        ({"vir": "off"}, pb.Router(mode=pb.Router.OFF)),
        ({"vir": "all"}, pb.Router(mode=pb.Router.ALL)),
        ({"vir_absolute_threshold": 0.25}, pb.Router(absolute_threshold=0.25)),
        ({"vir_relative_threshold": 0, "vir_absolute_threshold": 1}, pb.Router(relative_threshold=0, absolute_threshold=1)),
    ],
    ids=["off", "all", "one threshold", "both thresholds"],
)
async def test_the_operators_router_is_the_default(tmp_path: Path, options: dict[str, Any], router: pb.Router) -> None:
    async with start_stack(tmp_path, **options) as stack:
        for vir in ({}, {"mode": "auto", "relative_threshold": 0.5, "absolute_threshold": 0.75}):
            assert (await stack.chat(image_part(A), vir=vir)).status == 200
        requested = pb.Router(relative_threshold=0.5, absolute_threshold=0.75)
        assert [call.router for call in stack.vision.calls] == [router, requested]


async def test_the_reason_why_the_vision_worker_cannot_compress_reaches_the_client(stack: Stack) -> None:
    stack.vision.error = errors.InvalidRequest("this checkpoint has no router and cannot compress")
    response = await stack.chat(image_part(A), vir={"mode": "all"})
    assert (response.status, response.error["code"]) == (400, "invalid_request")
    assert response.error["message"] == "this checkpoint has no router and cannot compress"
    stack.vision.error = None
    await assert_serves_images(stack)


def image_part_with(image: bytes, **options: Any) -> dict[str, Any]:
    """Returns a content part with this image and these options."""
    return {"type": "image_url", "image_url": {"url": data_url(image), **options}}


async def test_each_image_of_a_request_has_its_own_options(tmp_path: Path) -> None:
    options: list[dict[str, Any]] = [
        {}, {"detail": "low"}, {"max_dynamic_patch": 6}, {"vir": {"mode": "all"}}, {"detail": "high", "vir": {"mode": "off"}},
    ]  # fmt: skip
    # the fake's visual tokens are not those that would be counted
    async with start_stack(tmp_path, early_prefill=False) as stack:
        response = await stack.chat(*(image_part_with(A, **image_options) for image_options in options), vir={"mode": "off"})
        assert response.status == 200
        calls = {call.images[0].key: (call.tiling.max_tiles, call.router.mode) for call in stack.vision.calls}
        off, compressing = pb.Router.OFF, pb.Router.ALL
        parts = message_content(stack)
        assert [calls[part["uuid"]] for part in parts] == [(12, off), (1, off), (6, off), (12, compressing), (12, off)]
        assert parts[0] == parts[4], "equivalent options have the same embedding"
        assert all(set(part) == {"type", "image_embeds", "uuid"} for part in parts)
        assert response.headers["X-DvD-Images"].endswith("reused=0; shared=0; encoded=5")
        assert len(stack.vision.calls) == 4


@pytest.mark.parametrize(("bound", "original", "default"), [(None, 12, 12), (40, 40, 12), (3, 3, 3)])
async def test_the_operator_limits_the_number_of_tiles(tmp_path: Path, bound: int | None, original: int, default: int) -> None:
    async with start_stack(tmp_path, max_tiles=bound) as stack:
        for detail, most in (("original", original), ("high", default), ("auto", default), ("low", 1)):
            assert (await stack.chat(image_part_with(image_file(most), detail=detail))).status == 200
            assert stack.vision.calls[-1].tiling == pb.Tiling(min_tiles=1, max_tiles=most), detail
        if original < 40:
            response = await stack.chat(text_part("a"), image_part_with(B, max_dynamic_patch=original + 1))
            assert (response.status, response.error["param"]) == (400, "messages[0].content[1].image_url.max_dynamic_patch")
            assert f"expected an integer from 1 to {original}, not {original + 1}" in response.error["message"]
        await assert_serves_images(stack)


async def test_the_operator_can_forbid_router_options(tmp_path: Path) -> None:
    async with start_stack(tmp_path, allow_vir=False, vir="all") as stack:
        for body in (chat("a", vir={"mode": "off"}), chat(image_part_with(A, vir={}))):
            response = await stack.post(body)
            assert (response.status, response.error["code"]) == (400, "invalid_request")
        await assert_serves_images(stack)
        assert stack.vision.calls[-1].router.mode == pb.Router.ALL


async def test_images_routed_as_a_group_must_have_the_same_options(tmp_path: Path) -> None:
    async with start_stack(tmp_path, router_scope="request") as stack:
        same = await stack.chat(image_part_with(A, detail="high"), image_part_with(B, max_dynamic_patch=12))
        assert same.status == 200
        for options in ({"detail": "low"}, {"vir": {"mode": "off"}}):
            response = await stack.chat(image_part(A), text_part("and"), image_part_with(B, **options))
            assert (response.status, response.error["param"]) == (400, "messages[0].content[2].image_url")
            assert "as one group" in response.error["message"]
        await assert_serves_images(stack)

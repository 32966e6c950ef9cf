"""Workers that answer what they should not: their requests move to another worker, and nothing else is harmed."""

from __future__ import annotations  # grpc.aio is generic for type checkers only

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from common import rpc
from protos import embeddings_pb2 as pb
from protos import vision_pb2
from tests.server.fakes.language_worker import FakeLanguageWorker, FakeSink
from tests.server.fakes.requests import image_file, image_part
from tests.server.fakes.stack import Stack, start_stack
from tests.server.fakes.vision_worker import FakeVisionWorker
from tests.server.fakes.waiting import wait_until

GARBAGE = b"\xff\xff\xff"
Reply = Callable[[Any], bytes]


def as_it_is(message: Any) -> bytes:
    return bytes(message.SerializeToString())


async def start_with_replies(fake: Any, service: str, replies: dict[str, Reply], **requests: Any) -> None:
    """Start a fake whose methods reply with what `replies` makes of their messages at that time."""

    def handler(method: str, request_type: Any) -> Any:
        async def serve(request: Any, context: Any) -> bytes:
            return replies.get(method, as_it_is)(await getattr(fake, method)(request, context))

        return grpc.unary_unary_rpc_method_handler(serve, request_deserializer=request_type.FromString)

    fake._server = rpc.create_server(fake.address)
    handlers = {method: handler(method, request_type) for method, request_type in requests.items()}
    if service == "dvd.v1.EmbeddingSink":
        handlers["Deliver"] = grpc.stream_unary_rpc_method_handler(
            fake.Deliver, pb.DeliverChunk.FromString, pb.DeliverReply.SerializeToString
        )
    fake._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    await fake._server.start()


class FaultyVisionWorker(FakeVisionWorker):
    """A vision worker with replies of its own."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.replies: dict[str, Reply] = {}

    async def start(self) -> None:
        requests = {"Describe": pb.DescribeRequest, "Encode": vision_pb2.EncodeRequest}
        await start_with_replies(self, "dvd.v1.Vision", self.replies, **requests)


class FaultySink(FakeSink):
    """A sink with replies of its own."""

    def __init__(self, address: str, http: str) -> None:
        super().__init__(address, http)
        self.replies: dict[str, Reply] = {}

    async def start(self) -> None:
        requests = {"Describe": pb.DescribeRequest, "Has": pb.HasRequest}
        await start_with_replies(self, "dvd.v1.EmbeddingSink", self.replies, **requests)


async def assert_images_are_served(stack: Stack, first: int) -> None:
    for index in range(first, first + 12):
        response = await stack.chat(image_part(image_file(index)))
        assert response.status == 200, response.body
    await stack.wait_until_idle()


def encoded(**fields: Any) -> bytes:
    return as_it_is(vision_pb2.EncodeReply(images=[vision_pb2.EncodedImage(**fields)]))


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(lambda _: GARBAGE, id="garbage"),
        pytest.param(lambda _: b"", id="no image"),
        pytest.param(lambda _: encoded(key="another", tokens=3, compressed=[False]), id="another key"),
        pytest.param(lambda reply: encoded(key=reply.images[0].key), id="no tokens"),
    ],
)
async def test_a_vision_worker_that_replies_nonsense_is_replaced(tmp_path: Path, reply: Reply) -> None:
    faulty, other = FaultyVisionWorker(f"unix:{tmp_path}/a"), FakeVisionWorker(f"unix:{tmp_path}/b")
    async with start_stack(tmp_path, [faulty, other]) as stack:
        faulty.replies["Encode"] = reply
        await assert_images_are_served(stack, 0)
        assert faulty.calls
        faulty.replies.clear()
        await assert_images_are_served(stack, 100)


@pytest.mark.parametrize("reply", [pytest.param(lambda _: GARBAGE, id="garbage"), pytest.param(lambda _: b"", id="no count")])
async def test_a_sink_that_replies_nonsense_is_replaced(tmp_path: Path, reply: Reply) -> None:
    languages = [FakeLanguageWorker(tmp_path, i) for i in range(2)]
    faulty = languages[0].sink = FaultySink(languages[0].sink.address, languages[0].engine.address)
    async with start_stack(tmp_path, 1, languages) as stack:
        faulty.replies["Has"] = reply
        await assert_images_are_served(stack, 0)
        faulty.replies.clear()
        await assert_images_are_served(stack, 100)


async def test_workers_whose_description_is_garbage_are_down_and_the_others_are_probed(tmp_path: Path) -> None:
    faulty, other = FaultyVisionWorker(f"unix:{tmp_path}/a"), FakeVisionWorker(f"unix:{tmp_path}/b")
    languages = [FakeLanguageWorker(tmp_path, i) for i in range(2)]
    sink = languages[0].sink = FaultySink(languages[0].sink.address, languages[0].engine.address)
    faulty.replies["Describe"] = sink.replies["Describe"] = lambda _: GARBAGE
    async with start_stack(tmp_path, [faulty, other], languages) as stack:  # it starts although they are there
        await assert_images_are_served(stack, 0)
        assert not faulty.calls
        await other.stop()
        await stack.wait_until_not_ready()
        faulty.replies.clear()
        await stack.wait_until_ready()
        sink.replies.clear()

        async def all_up() -> bool:
            return await stack.metric("dvd_worker_up") == 3

        await wait_until(all_up, "both language workers and one vision worker are up")
        await assert_images_are_served(stack, 100)

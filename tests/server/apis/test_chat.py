"""Chats: what is refused at the door, what is replaced, and that all else stays as it was."""

import contextlib
import json
from dataclasses import replace
from typing import Any

import pytest

from common import errors
from protos import vision_pb2 as pb
from server.apis import chat as chat_api
from server.apis import tokenize
from server.apis.image_options import RequestPolicy
from server.http.json_body import decode_object
from tests.server.fakes.requests import chat, image_file, image_part, text_part

parse_chat = chat_api.APIS[0].parse
parse_tokenize = tokenize.APIS[0].parse

IMAGE = image_part(image_file())


def raw(body: Any) -> bytes:
    return json.dumps(body).encode()


@pytest.mark.parametrize("text", [r"\ud83d\ude00", r"\u0000", r"\\ud800", "😀", "\\u00e9"])
def test_every_text_that_is_one_passes(text: str) -> None:
    body = f'{{"model": "m", "messages": [{{"role": "user", "content": "{text}"}}]}}'.encode()
    assert parse_chat(body, RequestPolicy(1)).with_embeddings([], []) is body


def test_of_a_name_that_comes_twice_the_last_counts_as_it_does_for_the_engine() -> None:
    body = b'{"model": "one", "model": "two", "messages": [{"role": "user", "content": "a"}]}'
    assert parse_chat(body, RequestPolicy(1)).model == json.loads(body)["model"] == "two"


def test_unknown_names_are_the_engines_business() -> None:
    body = raw({**chat("hello"), **{f"x{i}": i for i in range(100_000)}})
    assert parse_chat(body, RequestPolicy(1)).with_embeddings([], []) is body


MESSAGES: dict[str, Any] = {
    "none": [],
    "null": None,
    "text": "hello",
    "an object": {"role": "user"},
    "a number": 5,
    "of texts": ["hello"],
    "of nulls": [None],
    "of lists": [[]],
}


@pytest.mark.parametrize("messages", MESSAGES.values(), ids=MESSAGES)
def test_messages_that_are_none_are_refused(messages: Any) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        parse_chat(raw({"model": "m", "messages": messages}), RequestPolicy(1))
    assert caught.value.param == "messages"


def test_a_request_without_messages_is_refused() -> None:
    with pytest.raises(errors.InvalidRequest, match="messages"):
        parse_chat(raw({"model": "m"}), RequestPolicy(1))


def deep(depth: int) -> Any:
    made: Any = "x"
    for _ in range(depth):
        made = [made]
    return made


PARTS: dict[str, Any] = {
    "null": None,
    "number": 5,
    "list": [],
    "empty": {},
    "no type": {"text": "a"},
    "no type but an image": {"image_url": "https://example.org/a.png"},
    "type null": {"type": None},
    "type list": {"type": []},
    "type object": {"type": {}},
    "type deep": {"type": deep(900)},
    "type long": {"type": "x" * 100_000},
    "type unknown": {"type": "hologram"},
    "video without URL": {"type": "video_url", "video_url": {"num_frames": 4}},
    "video beside an image": {**IMAGE, "video_url": {"url": "https://example.org/a"}},
    "audio": {"type": "input_audio", "input_audio": {}},
    "embedding": {"type": "image_embeds", "image_embeds": {"image_num_tokens": [1]}, "uuid": "a"},
    "embedding in a text": {"type": "text", "text": "a", "image_embeds": {}},
    "image beside a text": {"type": "text", "text": "a", "image_url": {"url": "file:///etc/passwd"}},
    "key in an image": {**IMAGE, "uuid": "stolen"},
    "key in a text": {"type": "text", "text": "a", "uuid": "stolen"},
    "image that is missing": {"type": "image_url"},
    "image null": {"type": "image_url", "image_url": None},
    "image as a string": {"type": "image_url", "image_url": "https://example.org/a.png"},
    "image as a list": {"type": "image_url", "image_url": ["https://example.org/a.png"]},
    "image without URL": {"type": "image_url", "image_url": {"detail": "low"}},
    "URL null": {"type": "image_url", "image_url": {"url": None}},
    "URL empty": {"type": "image_url", "image_url": {"url": ""}},
    "URL number": {"type": "image_url", "image_url": {"url": 5}},
    "URL list": {"type": "image_url", "image_url": {"url": ["https://example.org/a.png"]}},
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_parts_that_are_neither_text_nor_image_are_refused_with_their_place(part: Any) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}, {"role": "user", "content": [text_part("b"), part]}]}
    with pytest.raises(errors.InvalidRequest) as caught:
        parse_chat(raw(body), RequestPolicy(9))
    assert caught.value.param == "messages[1].content[1]"
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("said", [{"mode": "off"}, {}, None])
def test_the_setting_of_the_router_does_not_go_to_the_engine(said: Any) -> None:
    for content in ("a", IMAGE):
        parsed = parse_chat(raw(chat(content, vir=said, seed=5)), RequestPolicy(1))
        made = json.loads(parsed.with_embeddings(["k"] * len(parsed.images), [1] * len(parsed.images)))
        assert list(made) == ["model", "messages", "seed"]


OFF, ALL, HALF = pb.Router(mode=pb.Router.OFF), pb.Router(mode=pb.Router.ALL), pb.Router(relative_threshold=0.5)


def with_words(**words: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {**IMAGE["image_url"], **words}}


def test_an_image_says_it_before_its_request_and_that_before_the_operator() -> None:
    images = [IMAGE, with_words(vir={"mode": "all"}), with_words(vir={"mode": "auto"}), with_words(vir={})]
    parsed = parse_chat(raw(chat(*images, vir={"mode": "off"})), RequestPolicy(4, HALF))
    assert [image.options.router for image in parsed.images] == [OFF, ALL, pb.Router(), OFF]
    parsed = parse_chat(raw(chat(*images)), RequestPolicy(4, HALF))
    assert [image.options.router for image in parsed.images] == [HALF, ALL, HALF, HALF]


def test_bad_words_of_an_image_are_refused_with_their_place() -> None:
    for words, param in (({"detail": "max"}, "detail"), ({"vir": {"mode": "on"}}, "vir.mode"), ({"vir": 1}, "vir")):
        with pytest.raises(errors.InvalidRequest) as caught:
            parse_chat(raw(chat(text_part("a"), with_words(**words))), RequestPolicy(1))
        assert caught.value.param == f"messages[0].content[1].image_url.{param}"


def test_a_bad_setting_of_the_router_is_refused_for_a_text_too() -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        parse_chat(raw(chat("a", vir={"mode": "on"})), RequestPolicy(1))
    assert caught.value.param == "vir.mode"


def test_tokenize_takes_a_text_or_a_chat() -> None:
    text = raw({"model": "m", "prompt": "see <image>"})
    assert parse_tokenize(text, RequestPolicy(1)).with_embeddings([], []) is text
    assert len(parse_tokenize(raw(chat(IMAGE)), RequestPolicy(1)).images) == 1
    with pytest.raises(errors.InvalidRequest, match="messages"):
        parse_tokenize(raw({"messages": []}), RequestPolicy(1))


def test_images_are_counted_over_all_messages() -> None:
    messages = [{"role": "user", "content": [IMAGE, IMAGE]}, {"role": "user", "content": [IMAGE]}]
    body = raw({"model": "m", "messages": messages})
    assert len(parse_chat(body, RequestPolicy(3)).images) == 3
    with pytest.raises(errors.TooManyImages, match="has 3 images; the maximum is 2"):
        parse_chat(body, RequestPolicy(2))


def test_ten_thousand_messages_are_read() -> None:
    body = raw({"model": "m", "messages": [{"role": "user", "content": [text_part("a")]}] * 10_000})
    assert parse_chat(body, RequestPolicy(1)).with_embeddings([], []) is body


WORDS = {
    "text": {"messages": [{"role": "user", "content": "<IMG_CONTEXT>" * 1000}]},
    "part": {"messages": [{"role": "user", "content": [text_part("see <image> here")]}]},
    "plain part": {"messages": [{"role": "user", "content": ["see <image> here"]}]},
    "escaped": {"messages": [{"role": "user", "content": "\u003cIMG_CONTEXT\u003e"}]},
    "name": {"messages": [{"role": "user", "name": "<image>", "content": "a"}]},
    "reasoning": {"messages": [{"role": "assistant", "content": None, "reasoning_content": "<image>"}]},
    "call": {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "<image>"}}]}]},
    "tool": {"tools": [{"type": "function", "function": {"name": "f", "description": "<IMG_CONTEXT>"}}]},
    "name in a tool": {"tools": [{"type": "function", "function": {"parameters": {"properties": {"<image>": {}}}}}]},
    "template": {"chat_template_kwargs": {"system": "<IMG_CONTEXT>"}},
    "what only looks like an image": {"tools": [{"type": "image_url", "description": "<image>"}]},
}


@pytest.mark.parametrize("fields", WORDS.values(), ids=WORDS)
def test_words_that_mark_an_image_are_refused_beside_one(fields: dict[str, Any]) -> None:
    image = {"role": "user", "content": [IMAGE]}
    with pytest.raises(errors.InvalidRequest, match="the placeholder of an image") as caught:
        parse_chat(raw({"model": "m", **fields, "messages": [*fields.get("messages", []), image]}), RequestPolicy(1))
    assert caught.value.param
    assert len(caught.value.param) <= 200
    alone = raw({"model": "m", "messages": [{"role": "user", "content": "a"}], **fields})
    assert parse_chat(alone, RequestPolicy(1)).with_embeddings([], []) is alone, "without an image they are text"


def test_images_are_replaced_in_order_and_nothing_else_changes() -> None:
    images = [image_part(image_file(i)) for i in range(4)]
    images[1]["image_url"]["detail"] = "high"
    body = {
        "model": "m",
        "temperature": 0.1,
        "logit_bias": {"7": -100},
        "seed": 2**63 - 1,
        "stop": ["é", "\u0000", "😀"],
        "unknown": {"nested": [None, True, 1.0, 1e-7, 12345678901234567890]},
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [images[0], text_part("and"), images[1]], "name": "me"},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}]},
            {"role": "user", "content": ["plain", text_part("then"), images[2]]},
            {"role": "user", "content": [images[3]]},
            {"role": "tool", "tool_call_id": "1"},
        ],
    }
    chat = parse_chat(raw(body), RequestPolicy(4))
    assert [image.url for image in chat.images] == [image["image_url"]["url"] for image in images]
    assert [image.options.detail for image in chat.images] == ["auto", "high", "auto", "auto"]
    made = json.loads(chat.with_embeddings(["k0", "k1", "k2", "k3"], [10, 11, 12, 13]))
    new = [{"type": "image_embeds", "image_embeds": {"image_num_tokens": [10 + i]}, "uuid": f"k{i}"} for i in range(4)]
    body["messages"][1]["content"] = [new[0], text_part("and"), new[1]]
    body["messages"][3]["content"] = ["plain", text_part("then"), new[2]]
    body["messages"][4]["content"] = [new[3]]
    assert made == body
    assert list(made) == list(body)


def test_equal_images_are_replaced_each_in_its_place() -> None:
    made = json.loads(parse_chat(raw(chat(IMAGE, text_part("a"), IMAGE)), RequestPolicy(2)).with_embeddings(["k", "k"], [5, 5]))
    assert [part["type"] for part in made["messages"][0]["content"]] == ["image_embeds", "text", "image_embeds"]


def test_a_text_request_is_passed_byte_for_byte() -> None:
    body = b'{ "messages":[{"content":"a\\u00e9 \xc3\xa9","role":"user"}] , "model" :"m","x":1.50, "x":[ ]}\n'
    assert parse_chat(body, RequestPolicy(1)).with_embeddings([], []) is body


@pytest.mark.parametrize("depth", [100, *range(900, 1000, 3)])
def test_any_depth_is_either_read_and_written_or_refused(depth: int) -> None:
    body = b'{"model": "m", "messages": [{"role": "user", "content": [%s]}], "x": %s}' % (
        raw(IMAGE),
        b"[" * depth + b"]" * depth,
    )
    with contextlib.suppress(errors.InvalidRequest) if depth > 100 else contextlib.nullcontext():
        assert decode_object(parse_chat(body, RequestPolicy(1)).with_embeddings(["k"], [1]))["model"] == "m"


def video(**words: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": "https://example.org/a.mp4", **words}}


def test_a_video_is_eight_frames_of_one_tile_unless_it_says_otherwise() -> None:
    parts = [video(), video(num_frames=3, vir={"mode": "off"}), video(max_dynamic_patch=2), video(detail="high")]
    images = parse_chat(raw(chat(IMAGE, *parts)), RequestPolicy(28)).images
    assert [image.frames for image in images] == [0, 8, 3, 8, 8]
    assert [image.options.detail for image in images] == ["auto", "low", "low", "auto", "high"]
    assert [image.options.max_tiles for image in images] == [None, None, None, 2, None]
    assert [image.options.router.mode for image in images] == [0, 0, pb.Router.OFF, 0, 0]


def test_frames_count_as_images() -> None:
    with pytest.raises(errors.TooManyImages, match=r"has 12 images \(frames of videos counted\); the maximum is 11"):
        parse_chat(raw(chat(IMAGE, video(), video(num_frames=3))), RequestPolicy(11))


@pytest.mark.parametrize("count", [0, -1, 1.0, "8", True, [8]])
def test_bad_numbers_of_frames_are_refused_with_their_place(count: Any) -> None:
    with pytest.raises(errors.InvalidRequest, match="not an integer above 0") as caught:
        parse_chat(raw(chat(text_part("a"), video(num_frames=count))), RequestPolicy(9))
    assert caught.value.param == "messages[0].content[1].video_url.num_frames"


def test_frames_take_their_videos_place_and_all_else_stays() -> None:
    parsed = parse_chat(
        raw(chat(IMAGE, video(), text_part("and"), video(num_frames=1), IMAGE, text_part("?"))), RequestPolicy(28)
    )
    image, long, short, last = parsed.images
    frames = [replace(long, label=f"Frame{i}: ") for i in (1, 2)]
    shown = replace(parsed, images=[image, *frames, replace(short, label="Frame1: "), last])
    (message,) = json.loads(shown.with_embeddings([*"abcde"], [1] * 5))["messages"]
    told = [part.get("uuid") or part["text"] for part in message["content"]]
    assert told == ["a", "Frame1: ", "b", "Frame2: ", "c", "and", "Frame1: ", "d", "e", "?"]

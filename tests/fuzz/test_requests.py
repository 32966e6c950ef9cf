"""Bodies of requests: every API parses them or rejects them, and what it sends to vLLM is JSON without its own fields."""

import contextlib
import gzip
import json
import zlib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from common import errors
from server.apis.base import Api
from server.apis.image_options import RequestPolicy
from server.apis.registry import APIS
from server.http import content_encoding
from tests.fuzz.strategies import damaged, json_values, near

POLICY = RequestPolicy(max_images=4)
_GOOD = "data:image/png;base64,AAAA"
_PARTS: list[Any] = [
    {"type": "text", "text": "what is it?"},
    {"type": "image_url", "image_url": {"url": _GOOD, "detail": "low"}, "max_dynamic_patch": 6, "vir": {"mode": "auto"}},
    {"type": "image_url", "image_url": _GOOD, "uuid": "x"},
    {"type": "video_url", "video_url": {"url": _GOOD, "num_frames": 2}},
    {"type": "input_image", "image_url": _GOOD, "detail": "auto"},
    {"type": "input_text", "text": "a"},
    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
    {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}},
    {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "a"}, "title": "b"},
    {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "a"}]},
    {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_image", "image_url": _GOOD}]},
    {"type": "refusal", "refusal": "no"},
    {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
]  # fmt: skip
_FIELDS: dict[str, Any] = {
    "model": "m", "vir": {"mode": "auto"}, "stream": True, "max_tokens": 5, "stream_options": {"include_usage": True}, "n": 1,
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "tool_choice": "auto", "stop": ["a"],
    "structured_outputs": {"choice": ["a"]}, "logit_bias": {"1": 1}, "system": "be brief", "temperature": 1, "seed": 1,
    "detail": "low", "max_dynamic_patch": 6, "logprobs": True, "top_logprobs": 2, "prompt": "a", "echo": False,
}  # fmt: skip


def bodies(example: dict[str, Any]) -> "st.SearchStrategy[Any]":
    """Return bodies near to an example: with other fields, and with parts of any API in the place of its own."""
    parts = st.sampled_from(_PARTS).flatmap(near)
    content = st.lists(parts, max_size=4) | st.text(max_size=20) | json_values
    message = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool", "developer", ""])},
                                    optional={"content": content, "output": content, "type": st.just("message")})  # fmt: skip
    lists = st.lists(message | parts, max_size=3)
    fields = {name: near(value) for name, value in _FIELDS.items()}
    changed = st.fixed_dictionaries(
        {}, optional={**fields, "messages": lists, "input": lists | content, "images": st.lists(json_values)}
    )
    return st.builds(lambda body, extra: {**body, **extra} if isinstance(body, dict) else body, near(example), changed)


requests = st.sampled_from(APIS).flatmap(
    lambda api: st.tuples(st.just(api), bodies(api.example).map(lambda body: json.dumps(body).encode()))
)


def check(api: Api, raw: bytes) -> None:
    """Parse a body as the gateway does, and build vLLM's from it."""
    try:
        request = api.parse(raw, POLICY)
    except errors.InvalidRequest as error:
        assert 400 <= error.status < 500
        assert len(str(error)) < 1500
        return
    assert len(request.images) <= POLICY.max_images
    try:
        sent = json.loads(request.with_embeddings(["k" * 64] * len(request.images), [5] * len(request.images)))
    except errors.InvalidRequest:
        return
    assert isinstance(sent, dict)
    assert "vir" not in sent


@given(requests)
def test_a_body_is_parsed_or_rejected_by_its_api(request_body: tuple[Api, bytes]) -> None:
    check(*request_body)


@given(st.sampled_from(APIS), st.data())
def test_a_damaged_body_is_parsed_or_rejected(api: Api, data: st.DataObject) -> None:
    check(api, data.draw(damaged([json.dumps(api.example).encode()]) | st.binary(max_size=50)))


@given(st.sampled_from(content_encoding.SUPPORTED), st.binary(max_size=300), st.integers(1, 500), st.data())
def test_a_damaged_compressed_body_is_decoded_within_the_limit(
    encoding: str, body: bytes, limit: int, data: st.DataObject
) -> None:
    zstd: Any = vars(content_encoding)["zstd"]  # of the standard library or backports
    files = [gzip.compress(body * limit), zlib.compress(body * limit), zstd.compress(body * limit), zlib.compress(body)[2:-4]]
    with contextlib.suppress(errors.BodyTooLarge, errors.InvalidRequest):
        assert len(content_encoding.decode(data.draw(damaged(files)), encoding, limit)) <= limit


@given(st.lists(st.text(max_size=20), max_size=3))
def test_an_encoding_is_named_or_rejected(headers: list[str]) -> None:
    with contextlib.suppress(errors.UnsupportedEncoding):
        assert content_encoding.parse(headers) in (None, *content_encoding.SUPPORTED)

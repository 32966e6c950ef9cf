"""Keys: everything that decides an embedding changes them, nothing else does."""

import dataclasses
import hashlib

import pytest

from protos import embeddings_pb2, vision_pb2
from server.keys import EncodeSetting, digest, group_keys, image_keys

SETTING = EncodeSetting("f" * 64, vision_pb2.Tiling(), vision_pb2.Router(), embeddings_pb2.BFLOAT16)
A, B, C = (hashlib.sha256(text).digest() for text in (b"a", b"b", b"c"))
OTHERS = {
    "fingerprint": "e" * 64,
    "tiling": vision_pb2.Tiling(max_tiles=6),
    "router": vision_pb2.Router(mode=vision_pb2.Router.OFF),
    "dtype": embeddings_pb2.FLOAT16,
}


def test_a_key_is_a_safe_name_and_stable() -> None:
    (key,) = image_keys(b"me", [SETTING], [A])
    assert len(key) == 64
    assert set(key) <= set("0123456789abcdef")
    assert image_keys(b"me", [SETTING], [A]) == [key]
    assert image_keys(b"me", [SETTING] * 3, [B, A, A])[1:] == [key, key], "alone, a neighbour changes nothing"


@pytest.mark.parametrize("field", OTHERS)
def test_whatever_decides_an_embedding_changes_its_key(field: str) -> None:
    changed = dataclasses.replace(SETTING, **{field: OTHERS[field]})
    assert image_keys(b"me", [changed], [A]) != image_keys(b"me", [SETTING], [A])


def test_two_settings_of_the_router_are_two_keys_even_at_zero() -> None:
    routers = [
        vision_pb2.Router(),
        vision_pb2.Router(mode=vision_pb2.Router.OFF),
        vision_pb2.Router(mode=vision_pb2.Router.ALL),
        vision_pb2.Router(relative_threshold=0),
        vision_pb2.Router(absolute_threshold=0),
        vision_pb2.Router(relative_threshold=0, absolute_threshold=0),
        vision_pb2.Router(relative_threshold=0.25),
        vision_pb2.Router(absolute_threshold=0.25),
    ]
    keys = [image_keys(b"me", [dataclasses.replace(SETTING, router=router)], [A])[0] for router in routers]
    assert len(set(keys)) == len(routers)


def test_each_image_has_a_setting_of_its_own() -> None:
    other = dataclasses.replace(SETTING, tiling=vision_pb2.Tiling(max_tiles=6))
    one, two, three = image_keys(b"me", [SETTING, other, SETTING], [A, A, A])
    assert one == three != two == image_keys(b"me", [other], [A])[0]


def test_callers_share_no_key() -> None:
    assert image_keys(b"me", [SETTING], [A]) != image_keys(b"you", [SETTING], [A])
    assert not set(group_keys(b"me", SETTING, [A, B])) & set(group_keys(b"you", SETTING, [A, B]))


def test_in_a_group_neighbours_and_places_count() -> None:
    group = group_keys(b"me", SETTING, [A, B])
    assert len(set(group)) == 2
    assert group_keys(b"me", SETTING, [A, B]) == group
    for other in ([B, A], [A, C], [A, B, C], [A, A]):
        assert not set(group_keys(b"me", SETTING, other)) & set(group)
    assert len(set(group_keys(b"me", SETTING, [A, A]))) == 2, "the same image twice may be routed twice"
    assert not set(group) & set(image_keys(b"me", [SETTING] * 2, [A, B]))


def test_a_group_of_one_is_an_image_alone() -> None:
    assert group_keys(b"me", SETTING, [A]) == image_keys(b"me", [SETTING], [A])


@pytest.mark.parametrize(("one", "other"), [((b"ab", b"c"), (b"a", b"bc")), ((b"",), ()), ((b"a", b""), (b"a",))])
def test_lists_of_fields_do_not_run_together(one: tuple[bytes, ...], other: tuple[bytes, ...]) -> None:
    assert digest(*one) != digest(*other)

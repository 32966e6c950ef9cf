"""Keys of embeddings: they depend on all that determines an embedding, and on nothing else."""

import dataclasses
import hashlib
from typing import Any

import pytest

from common.digest import digest
from protos import embeddings_pb2, vision_pb2
from server.keys import EncodeSetting, group_keys, image_keys

SETTING = EncodeSetting("f" * 64, vision_pb2.Tiling(), vision_pb2.Router(), embeddings_pb2.BFLOAT16)
A, B, C = (hashlib.sha256(text).digest() for text in (b"a", b"b", b"c"))
CHANGES: dict[str, Any] = {
    "fingerprint": "e" * 64,
    "tiling": vision_pb2.Tiling(max_tiles=6),
    "router": vision_pb2.Router(mode=vision_pb2.Router.OFF),
    "dtype": embeddings_pb2.FLOAT16,
}


def test_a_key_is_64_hexadecimal_digits_and_stable() -> None:
    (key,) = image_keys(b"me", [SETTING], [A])
    assert len(key) == 64
    assert set(key) <= set("0123456789abcdef")
    assert image_keys(b"me", [SETTING], [A]) == [key]
    assert image_keys(b"me", [SETTING] * 3, [B, A, A])[1:] == [key, key], "other images do not change it"


@pytest.mark.parametrize("field", CHANGES)
def test_each_field_of_the_setting_changes_the_key(field: str) -> None:
    changed = dataclasses.replace(SETTING, **{field: CHANGES[field]})
    assert image_keys(b"me", [changed], [A]) != image_keys(b"me", [SETTING], [A])


def test_each_dtype_has_keys_of_its_own() -> None:
    dtypes = [number for number in embeddings_pb2.Dtype.values() if number]
    keys = [image_keys(b"me", [dataclasses.replace(SETTING, dtype=dtype)], [A])[0] for dtype in dtypes]
    assert len(set(keys)) == len(dtypes) == 5


def test_a_threshold_of_zero_differs_from_an_unset_one() -> None:
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


def test_each_image_has_its_own_setting() -> None:
    other = dataclasses.replace(SETTING, tiling=vision_pb2.Tiling(max_tiles=6))
    first, second, third = image_keys(b"me", [SETTING, other, SETTING], [A, A, A])
    assert first == third != second == image_keys(b"me", [other], [A])[0]


def test_callers_have_different_keys() -> None:
    assert image_keys(b"me", [SETTING], [A]) != image_keys(b"you", [SETTING], [A])
    assert not set(group_keys(b"me", SETTING, [A, B])) & set(group_keys(b"you", SETTING, [A, B]))


def test_keys_of_a_group_depend_on_all_its_images_and_their_order() -> None:
    group = group_keys(b"me", SETTING, [A, B])
    assert len(set(group)) == 2
    assert group_keys(b"me", SETTING, [A, B]) == group
    for other in ([B, A], [A, C], [A, B, C], [A, A]):
        assert not set(group_keys(b"me", SETTING, other)) & set(group)
    assert len(set(group_keys(b"me", SETTING, [A, A]))) == 2, "two copies of an image may be routed differently"
    assert not set(group) & set(image_keys(b"me", [SETTING] * 2, [A, B]))


def test_a_group_of_one_image_has_the_key_of_an_image_routed_by_itself() -> None:
    assert group_keys(b"me", SETTING, [A]) == image_keys(b"me", [SETTING], [A])


@pytest.mark.parametrize(("first", "second"), [((b"ab", b"c"), (b"a", b"bc")), ((b"",), ()), ((b"a", b""), (b"a",))])
def test_different_lists_of_fields_have_different_digests(first: tuple[bytes, ...], second: tuple[bytes, ...]) -> None:
    assert digest(*first) != digest(*second)

"""The URL of an embedding, and that no other URL is taken for one."""

import pytest

from common.embedding_ref import EmbeddingRef, parse_embedding_url

KEY = "0123456789abcdef" * 4


def test_a_reference_survives_its_url() -> None:
    ref = EmbeddingRef(KEY, 1792)
    assert ref.url == f"dvd:{KEY}/1792"
    assert parse_embedding_url(ref.url) == ref


@pytest.mark.parametrize(
    "url",
    [
        "", "dvd:", "https://example.org/a.png", "data:image/png;base64,iVBORw0K", f"dvd:{KEY}", f"dvd:{KEY}/", f"dvd:{KEY}/0",
        f"dvd:{KEY}/-1", f"dvd:{KEY}/1e3", f"dvd:{KEY}/{'9' * 10}", f"dvd:{KEY[1:]}/1", f"dvd:{KEY}0/1", f"dvd:{KEY.upper()}/1",
        f"DVD:{KEY}/1", f" dvd:{KEY}/1", f"dvd:{KEY}/1\n", f"dvd:../{KEY[3:]}/1", f"dvd:{KEY}/1/2", f"dvd:{KEY}/１",
    ],
)  # fmt: skip
def test_other_urls_are_no_reference(url: str) -> None:
    assert parse_embedding_url(url) is None

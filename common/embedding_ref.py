"""How an image that has become an embedding is named to an engine that asks for a URL: `dvd:KEY/TOKENS`.

Routes of the engine that take no embedding take images by URL. A language worker opens no URL but these.
"""

import re
from dataclasses import dataclass

_URL = re.compile(r"dvd:([0-9a-f]{64})/([1-9][0-9]{0,8})")


@dataclass(frozen=True)
class EmbeddingRef:
    """An embedding by its key, and how many visual tokens it has."""

    key: str
    tokens: int

    @property
    def url(self) -> str:
        return f"dvd:{self.key}/{self.tokens}"


def parse_embedding_url(url: str) -> EmbeddingRef | None:
    """None where it is no such URL."""
    found = _URL.fullmatch(url)
    return EmbeddingRef(found[1], int(found[2])) if found else None

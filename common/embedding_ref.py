"""URL of an embedding, `dvd:KEY/TOKENS`, which replaces the URL of an image in requests to vLLM.

Some of vLLM's routes accept images by URL only, not embeddings. A language worker opens no other URL than these.
"""

import re
from dataclasses import dataclass

_URL = re.compile(r"dvd:([0-9a-f]{64})/([1-9][0-9]{0,7})")


@dataclass(frozen=True)
class EmbeddingRef:
    """An embedding's key and its number of visual tokens."""

    key: str
    tokens: int

    @property
    def url(self) -> str:
        """The reference as a URL."""
        return f"dvd:{self.key}/{self.tokens}"


def parse_embedding_url(url: str) -> EmbeddingRef | None:
    """Return the reference in a URL, or None if it is another kind of URL."""
    match = _URL.fullmatch(url)
    return EmbeddingRef(match[1], int(match[2])) if match else None

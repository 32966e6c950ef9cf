"""vLLM's media connector in a language worker. It opens no URL and decodes no file: the gateway has done both."""

from typing import Any, NoReturn

from vllm.exceptions import VLLMValidationError

from common import embedding_ref
from common.embedding_ref import EmbeddingRef


class RefuseMedia:
    """A media connector that fetches nothing.

    An image's URL may only name an embedding (`common/embedding_ref.py`). Every other URL and every other kind of media
    raises `VLLMValidationError`, which vLLM answers with 400.
    """

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def fetch_image(self, image_url: str, **_kwargs: Any) -> EmbeddingRef:
        """The embedding that `image_url` names. Raises `VLLMValidationError`."""
        return embedding_ref.parse_embedding_url(image_url) or self._reject()

    async def fetch_image_async(self, image_url: str, **_kwargs: Any) -> EmbeddingRef:
        """Same as `fetch_image`."""
        return self.fetch_image(image_url)

    def __getattr__(self, name: str) -> Any:
        # vLLM's media connector has a method per kind of media: methods of newer versions are rejected too
        if not name.startswith(("fetch_", "load_")):
            raise AttributeError(name)
        return self._reject_async if name.endswith("_async") else self._reject

    def _reject(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise VLLMValidationError("A language worker does not fetch media; send the request to the gateway.")

    async def _reject_async(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        self._reject()

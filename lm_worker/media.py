"""A language worker opens no URL and decodes no file: images reach it as keys, from the gateway."""

from typing import Any, NoReturn

from vllm.exceptions import VLLMValidationError

from common import embedding_ref
from common.embedding_ref import EmbeddingRef


class RefuseMedia:
    """vLLM's media connector that fetches nothing: an image is a key in a URL. For all else it raises a 400."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def fetch_image(self, image_url: str, **_kwargs: Any) -> EmbeddingRef:
        return embedding_ref.parse_embedding_url(image_url) or self._refuse()

    async def fetch_image_async(self, image_url: str, **_kwargs: Any) -> EmbeddingRef:
        return self.fetch_image(image_url)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith(("fetch_", "load_")):
            raise AttributeError(name)
        return self._refuse_async if name.endswith("_async") else self._refuse

    def _refuse(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise VLLMValidationError("media reach a language worker through the gateway only; send the request there")

    async def _refuse_async(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        self._refuse()

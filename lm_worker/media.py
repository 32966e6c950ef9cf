"""A language worker opens no URL and decodes no file: images reach it as keys, from the gateway."""

from typing import Any, NoReturn

from vllm.exceptions import VLLMValidationError


class RefuseMedia:
    """vLLM's media connector that fetches nothing. Every method it is asked for raises a 400."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if not name.startswith(("fetch_", "load_")):
            raise AttributeError(name)
        return self._refuse_async if name.endswith("_async") else self._refuse

    def _refuse(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise VLLMValidationError("media reach a language worker through the gateway only; send the request there")

    async def _refuse_async(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        self._refuse()

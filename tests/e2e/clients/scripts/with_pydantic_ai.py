"""Pydantic AI: agents with both of OpenAI's APIs and with Anthropic's."""

import asyncio
import base64
from collections.abc import Callable
from typing import Any

from anthropic import AsyncAnthropic
from cases import SETTINGS, WRONG_KEY, Shape, base64_of, error_of, run
from openai import AsyncOpenAI
from pydantic_ai import Agent, BinaryContent, ImageUrl, NativeOutput, ToolOutput
from pydantic_ai.models import Model
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

IMAGE = BinaryContent(base64.b64decode(base64_of(SETTINGS.image)), media_type="image/png")
BROKEN_IMAGE = BinaryContent(base64.b64decode(base64_of(SETTINGS.broken_image)), media_type="image/png")


def openai(key: str) -> OpenAIProvider:
    return OpenAIProvider(openai_client=AsyncOpenAI(base_url=f"{SETTINGS.url}/v1", api_key=key, max_retries=0))


def chat(key: str = SETTINGS.key) -> Model:
    return OpenAIChatModel(SETTINGS.model, provider=openai(key))


def responses(key: str = SETTINGS.key) -> Model:
    return OpenAIResponsesModel(SETTINGS.model, provider=openai(key))


def messages(key: str = SETTINGS.key) -> Model:
    client = AsyncAnthropic(base_url=SETTINGS.url, api_key=key, max_retries=0)
    return AnthropicModel(SETTINGS.model, provider=AnthropicProvider(anthropic_client=client))


def agent(model: Model, max_tokens: int = SETTINGS.answer_tokens, **options: Any) -> Agent[None, Any]:
    # random weights would add one call after another
    settings = {"temperature": 0, "max_tokens": max_tokens, "parallel_tool_calls": False}
    return Agent(model, model_settings=settings, retries=0, **options)


def usage_of(usage: Any) -> dict[str, int]:
    return {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens}


def answer(model: Model, image: Any) -> dict[str, Any]:
    result = agent(model).run_sync([image, SETTINGS.question])
    return {"text": result.output, "usage": usage_of(result.usage)}


def stream(model: Model) -> dict[str, Any]:
    async def collect() -> dict[str, Any]:
        async with agent(model).run_stream([IMAGE, SETTINGS.question]) as result:
            pieces = [piece async for piece in result.stream_text(delta=True, debounce_by=None)]
            return {"pieces": pieces, "usage": usage_of(result.usage)}

    return asyncio.run(collect())


def structured(model: Model, output: Any) -> dict[str, Any]:
    return agent(model, 200, output_type=output).run_sync([IMAGE, SETTINGS.question]).output.model_dump()


def cases_of(name: str, create: Callable[..., Model]) -> dict[str, Callable[[], Any]]:
    cases = {
        "answer": lambda: answer(create(), IMAGE),
        "answer_to_url": lambda: answer(create(), ImageUrl(SETTINGS.image_url)),
        "stream": lambda: stream(create()),
        "structured_by_tool": lambda: structured(create(), ToolOutput(Shape)),
        "broken_image": lambda: error_of(lambda: answer(create(), BROKEN_IMAGE)),
        "wrong_key": lambda: error_of(lambda: answer(create(WRONG_KEY), IMAGE)),
    }
    return {f"{name}.{case}": function for case, function in cases.items()}


# not with Anthropic's API: Pydantic AI allows it for the names of some of Anthropic's models only
native = {
    "chat.structured": lambda: structured(chat(), NativeOutput(Shape)),
    "responses.structured": lambda: structured(responses(), NativeOutput(Shape)),
}
run({**cases_of("chat", chat), **cases_of("responses", responses), **cases_of("messages", messages), **native})

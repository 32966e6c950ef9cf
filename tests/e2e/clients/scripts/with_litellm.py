"""LiteLLM: its providers for OpenAI's and Anthropic's APIs."""

import json
from collections.abc import Callable
from typing import Any

import litellm
from cases import SETTINGS, WRONG_KEY, Shape, error_of, run

TOOL = {"type": "function", "function": {"name": "Shape", "parameters": Shape.model_json_schema()}}


def complete(provider: str, image: str = SETTINGS.image, key: str = SETTINGS.key, **options: Any) -> Any:
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": SETTINGS.question}]
    return litellm.completion(
        model=f"{provider}/{SETTINGS.model}",
        api_base=SETTINGS.url if provider == "anthropic" else f"{SETTINGS.url}/v1",
        api_key=key,
        messages=[{"role": "user", "content": content}],
        temperature=0,
        num_retries=0,
        **{"max_tokens": SETTINGS.answer_tokens, **options},
    )


def usage_of(usage: Any) -> dict[str, int]:
    return {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens}


def answer(provider: str, image: str) -> dict[str, Any]:
    result = complete(provider, image)
    return {"text": result.choices[0].message.content, "usage": usage_of(result.usage)}


def stream(provider: str) -> dict[str, Any]:
    chunks = list(complete(provider, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    return {"pieces": pieces, "usage": usage_of(litellm.stream_chunk_builder(chunks).usage)}


def structured(provider: str) -> Any:
    result = complete(provider, response_format=Shape, max_tokens=200)
    return json.loads(result.choices[0].message.content)


def tool_call(provider: str) -> dict[str, Any]:
    choice = {"type": "function", "function": {"name": "Shape"}}
    result = complete(provider, tools=[TOOL], tool_choice=choice, max_tokens=200)
    (call,) = result.choices[0].message.tool_calls
    return {"name": call.function.name, "arguments": json.loads(call.function.arguments)}


def cases_of(name: str, provider: str) -> dict[str, Callable[[], Any]]:
    cases = {
        "answer": lambda: answer(provider, SETTINGS.image),
        "stream": lambda: stream(provider),
        "structured": lambda: structured(provider),
        "tool_call": lambda: tool_call(provider),
        "broken_image": lambda: error_of(lambda: complete(provider, SETTINGS.broken_image)),
        "wrong_key": lambda: error_of(lambda: complete(provider, key=WRONG_KEY)),
    }
    return {f"{name}.{case}": function for case, function in cases.items()}


# not with Anthropic's API: LiteLLM fetches http URLs itself there, and none of this machine
by_url = {"chat.answer_to_url": lambda: answer("openai", SETTINGS.image_url)}
run({**cases_of("chat", "openai"), **by_url, **cases_of("messages", "anthropic")})

"""LangChain: ChatOpenAI with both of OpenAI's APIs, and ChatAnthropic."""

from collections.abc import Callable
from typing import Any

from cases import SETTINGS, WRONG_KEY, Shape, error_of, run
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI


def chat(key: str = SETTINGS.key, max_tokens: int = SETTINGS.answer_tokens) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{SETTINGS.url}/v1", api_key=key, model=SETTINGS.model, temperature=0, max_tokens=max_tokens, max_retries=0,
        stream_usage=True,
    )  # fmt: skip


def responses(key: str = SETTINGS.key, max_tokens: int = SETTINGS.answer_tokens) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{SETTINGS.url}/v1", api_key=key, model=SETTINGS.model, temperature=0, max_tokens=max_tokens, max_retries=0,
        use_responses_api=True,
    )  # fmt: skip


def messages(key: str = SETTINGS.key, max_tokens: int = SETTINGS.answer_tokens) -> ChatAnthropic:
    return ChatAnthropic(
        base_url=SETTINGS.url, api_key=key, model_name=SETTINGS.model, temperature=0, max_tokens=max_tokens, max_retries=0
    )


def question(image: str) -> list[HumanMessage]:
    """Return a message with an image in OpenAI's format, which LangChain converts for other APIs."""
    return [HumanMessage([
        {"type": "image_url", "image_url": {"url": image}},
        {"type": "text", "text": SETTINGS.question},
    ])]  # fmt: skip


def answer(model: Any, image: str) -> dict[str, Any]:
    result = model.invoke(question(image))
    return {"text": result.text, "usage": result.usage_metadata}


def stream(model: Any) -> dict[str, Any]:
    chunks = list(model.stream(question(SETTINGS.image)))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return {"pieces": [chunk.text for chunk in chunks if chunk.text], "text": whole.text, "usage": whole.usage_metadata}


def structured(model: Any, **options: Any) -> dict[str, Any]:
    return model.with_structured_output(Shape, **options).invoke(question(SETTINGS.image)).model_dump()


def tool_call(model: Any) -> dict[str, Any]:
    result = model.bind_tools([Shape], tool_choice="Shape").invoke(question(SETTINGS.image))
    (call,) = result.tool_calls
    return {"name": call["name"], "arguments": call["args"]}


def cases_of(name: str, create: Callable[..., Any]) -> dict[str, Callable[[], Any]]:
    cases = {
        "answer": lambda: answer(create(), SETTINGS.image),
        "answer_to_url": lambda: answer(create(), SETTINGS.image_url),
        "stream": lambda: stream(create()),
        "structured": lambda: structured(create(max_tokens=200)),
        "tool_call": lambda: tool_call(create(max_tokens=200)),
        "broken_image": lambda: error_of(lambda: create().invoke(question(SETTINGS.broken_image))),
        "wrong_key": lambda: error_of(lambda: create(WRONG_KEY).invoke(question(SETTINGS.image))),
    }
    return {f"{name}.{case}": function for case, function in cases.items()}


run({**cases_of("chat", chat), **cases_of("responses", responses), **cases_of("messages", messages)})

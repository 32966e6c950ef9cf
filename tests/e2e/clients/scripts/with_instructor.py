"""instructor: structured answers by a tool call and by a JSON schema, whole and in parts."""

from collections.abc import Callable
from typing import Any

import instructor
from cases import SETTINGS, WRONG_KEY, Shape, error_of, run
from openai import OpenAI


def client(mode: instructor.Mode, key: str = SETTINGS.key) -> instructor.Instructor:
    return instructor.from_openai(OpenAI(base_url=f"{SETTINGS.url}/v1", api_key=key, max_retries=0), mode=mode)


def request(image: str = SETTINGS.image) -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": SETTINGS.question}]
    return {
        "model": SETTINGS.model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 200,
        "max_retries": 0,
        "response_model": Shape,
    }


def structured(mode: instructor.Mode) -> dict[str, Any]:
    return client(mode).create(**request()).model_dump()


def stream(mode: instructor.Mode) -> dict[str, Any]:
    *_, last = client(mode).create_partial(**request())
    return last.model_dump()


def cases_of(name: str, mode: instructor.Mode) -> dict[str, Callable[[], Any]]:
    cases = {
        "structured": lambda: structured(mode),
        "structured_stream": lambda: stream(mode),
        "broken_image": lambda: error_of(lambda: client(mode).create(**request(SETTINGS.broken_image))),
        "wrong_key": lambda: error_of(lambda: client(mode, WRONG_KEY).create(**request())),
    }
    return {f"{name}.{case}": function for case, function in cases.items()}


run({**cases_of("tools", instructor.Mode.TOOLS), **cases_of("schema", instructor.Mode.JSON_SCHEMA)})

"""The load: questions whose exact answers are known, streams and disconnects. Every request ends in one outcome."""

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

from tests.e2e.test_exactness import CASES, messages

NAME = "flash-qwen3"
_ABANDONED_SHARE = 0.1
_STREAM_SHARE = 0.4
_TEXT_SHARE = 0.3
_TIMEOUT_SECONDS = 60
_MAX_TILES = 8

OUTCOMES = ("right", "refused", "late", "abandoned", "wrong", "broken", "failed")
"""right: the exact answer. refused: 429 or 503 with an error object, or an error event in a stream. late: 504. abandoned: the
client disconnected. wrong: another answer. broken: no complete response. failed: any other error. The last three are faults
of the server."""
FAULTS = OUTCOMES[-3:]


@dataclass(frozen=True)
class Outcome:
    """How a request ended, when (monotonic seconds), after how many seconds, and what was received if that is a fault."""

    name: str
    at: float
    seconds: float
    detail: str = ""


def questions() -> list[tuple[list[dict[str, Any]], list[int]]]:
    """Return conversations with the token ids of their answers."""
    cases = [case for case in CASES[NAME] if sum(case["num_tiles"]) <= _MAX_TILES]
    return [(messages(NAME, case), case["greedy_token_ids"]) for case in cases]


class Load:
    """Sends requests until it is stopped.

    Args:
        choose_url: Returns the URL of a gateway that is ready.
        record: Called with each outcome.
        seed: Seed of what is sent.
    """

    def __init__(self, choose_url: Callable[[], str], record: Callable[[Outcome], None], seed: int) -> None:
        self._choose_url, self._record, self._random = choose_url, record, random.Random(seed)
        self._questions = questions()
        self._text_answers: dict[str, list[int]] = {}
        self._is_stopping = False

    def stop(self) -> None:
        """Send no further requests."""
        self._is_stopping = True

    async def run(self, senders: int) -> None:
        """Keep this many requests in flight until `stop`."""
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*(self._send_all(session) for _ in range(senders)))

    async def _send_all(self, session: aiohttp.ClientSession) -> None:
        while not self._is_stopping:
            started = time.monotonic()
            name, detail = await self._send(session)
            now = time.monotonic()
            self._record(Outcome(name, now, now - started, detail if name in FAULTS else ""))
            if name == "refused":
                await asyncio.sleep(0.3)

    async def _send(self, session: aiohttp.ClientSession) -> tuple[str, str]:
        conversation, expected = self._next_question()
        stream = self._random.random() < _STREAM_SHARE
        body = {"messages": conversation, "max_tokens": 16, "temperature": 0, "ignore_eos": True, "return_token_ids": True,
                "stream": stream}  # fmt: skip
        request = self._post(session, body, expected, stream)
        try:
            if self._random.random() < _ABANDONED_SHARE:
                async with asyncio.timeout(self._random.uniform(0.01, 1.0)):
                    return await request
            return await request
        except TimeoutError:
            return "abandoned", ""
        except aiohttp.ClientError as error:
            return "broken", f"{type(error).__name__}: {error}"

    def _next_question(self) -> tuple[list[dict[str, Any]], list[int]]:
        if self._random.random() >= _TEXT_SHARE:
            return self._random.choice(self._questions)
        text = f"What is {self._random.randrange(20)}?"
        # the first answer is the expected one, since no official answer is known
        return [{"role": "user", "content": text}], self._text_answers.setdefault(text, [])

    async def _post(
        self, session: aiohttp.ClientSession, body: dict[str, Any], expected: list[int], stream: bool
    ) -> tuple[str, str]:
        async with session.post(f"{self._choose_url()}/v1/chat/completions", json=body) as response:
            text = await response.text()
            if response.status != 200:
                return classify(response.status, text)
        if not stream:
            ids = json.loads(text)["choices"][0]["token_ids"]
        else:
            events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
            if errors := [event for event in events if event.startswith('{"error"')]:
                return "refused", errors[0]
            if events[-1:] != ["[DONE]"]:
                return "broken", text[-300:]
            chunks = [json.loads(event) for event in events[:-1]]
            ids = [token for chunk in chunks for choice in chunk["choices"] for token in choice.get("token_ids") or []]
        if not expected:
            expected += ids
        return ("right", "") if ids == expected else ("wrong", f"{body['messages'][-1]['content']!s:.300}: {ids}")


def classify(status: int, text: str) -> tuple[str, str]:
    """Return the outcome of a response that is no answer, and what was received."""
    try:
        code = json.loads(text)["error"]["code"]
    except (ValueError, LookupError, TypeError):
        return "failed", f"{status} without an error object: {text[:200]}"
    names = {429: "refused", 503: "refused", 504: "late"}
    return names.get(status, "failed"), f"{status} {code}: {text[:200]}"

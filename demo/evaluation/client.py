"""HTTP client of the evaluation."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import aiohttp

from common.secrets import redact_url
from demo.evaluation.answers import AnswerFile, AnswerRecord
from demo.evaluation.plan import (
    COMPRESSED_TILE_TOKENS,
    TILE_TOKENS,
    ImageSetting,
    PlannedRequest,
    QuestionGroup,
    image_data_urls,
)
from demo.evaluation.progress import Progress

RETRY_DELAYS_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)
BUSY_DELAY_SECONDS, BUSY_SECONDS = 1.0, 600.0
"""Shortest time between two attempts, and time of them all, of a request that the server has no room for (429)."""
_MAX_RETRY_AFTER_SECONDS = 30.0
_RETRIED_STATUSES = (429, 502, 503, 504)
_MAX_ANSWER_TOKENS = 64
_MAX_ERROR_CHARACTERS = 500

Json = dict[str, Any]


class EvaluationError(Exception):
    """The evaluation cannot continue. The message says why."""


class Client:
    """Client of one server and of the first model that it lists."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self._url = session, url.rstrip("/")
        self.model = ""

    async def describe(self) -> Json:
        """Return model and versions, for the results. Call it first: it sets `model`. Raises: EvaluationError."""
        self.model = str((await self._request("GET", "/v1/models"))[0]["data"][0]["id"])
        return {"model": self.model, **(await self._request("GET", "/version"))[0]}

    async def ask(self, group: QuestionGroup, request: PlannedRequest, image_urls: Sequence[str]) -> AnswerRecord:
        """Send one question and return its record.

        Raises:
            EvaluationError: The server fails, or ignores the router setting.
        """
        text = request.question.text
        tiles = {"max_dynamic_patch": request.setting.max_tiles} if request.setting.max_tiles else {}
        images = ({"type": "image_url", "image_url": {"url": url, **tiles}} for url in image_urls)
        parts = [*images, {"type": "text", "text": text}]
        body = {
            "model": self.model,
            "temperature": 0,
            "max_tokens": _MAX_ANSWER_TOKENS,
            "messages": [{"role": "user", "content": parts if image_urls else text}],
            **({"vir": request.setting.vir} if request.setting.vir else {}),
        }
        response, headers = await self._request("POST", "/v1/chat/completions", body)
        record = AnswerRecord(
            name=request.name,
            model=self.model,
            stream=group.stream,
            index=group.index,
            setting=request.setting.name,
            task=request.question.task,
            question=text,
            expected=request.question.answer,
            answer=response["choices"][0]["message"]["content"] or "",
            tokens=_visual_tokens(headers),
            uncompressed_tokens=group.uncompressed_tokens,
        )
        _check_router_setting(request.setting, record)
        return record

    async def _request(self, method: str, path: str, body: Json | None = None) -> tuple[Any, Mapping[str, str]]:
        """Return JSON and headers of a successful response. Busy and unreachable servers are retried, busy ones for longer."""
        delays, busy_until = iter(RETRY_DELAYS_SECONDS), time.monotonic() + BUSY_SECONDS
        while True:
            retry_after, is_busy = 0.0, False
            try:
                async with self._session.request(method, self._url + path, json=body) as response:
                    if response.status == 200:
                        return await response.json(), response.headers
                    problem = f"{response.status}: {(await response.text())[:_MAX_ERROR_CHARACTERS]}"
                    if response.status not in _RETRIED_STATUSES:
                        break
                    is_busy = response.status == 429 and time.monotonic() < busy_until
                    with suppress(ValueError):
                        retry_after = float(response.headers.get("Retry-After", ""))
            except (aiohttp.ClientError, TimeoutError) as error:
                problem = f"{type(error).__name__}: {error}"
            delay = BUSY_DELAY_SECONDS if is_busy else next(delays, None)
            if delay is None:
                break
            await asyncio.sleep(min(_MAX_RETRY_AFTER_SECONDS, max(delay, retry_after)))
        raise EvaluationError(redact_url(f"{method} {self._url}{path} failed with {problem}"))


async def ask_all(client: Client, part: str, groups: Sequence[QuestionGroup], answers: AnswerFile, concurrency: int) -> None:
    """Ask all questions that have no answer yet, `concurrency` groups at a time.

    Raises:
        EvaluationError: A request failed. Answers so far are stored.
    """
    incomplete = [group for group in groups if any(request not in answers for request in group.requests)]
    progress = Progress(part, sum(len(group.requests) for group in groups), answers.records_of(groups))
    queue = iter(incomplete)

    async def work() -> None:
        for group in queue:
            image_urls = await asyncio.to_thread(image_data_urls, group)
            for request in group.requests:
                if request not in answers:
                    record = await client.ask(group, request, image_urls)
                    answers.add(record)
                    progress.step(record.is_correct)

    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(concurrency):
                tasks.create_task(work())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        progress.end()


def _visual_tokens(headers: Mapping[str, str]) -> int | None:
    """Read `X-DvD-Images`, such as `images=1; tiles=7; compressed=3; tokens=1216; reused=0`."""
    values = dict(pair.split("=", 1) for pair in headers.get("X-DvD-Images", "").split("; ") if "=" in pair)
    return int(values["tokens"]) if "tokens" in values else None


def _check_router_setting(setting: ImageSetting, record: AnswerRecord) -> None:
    """Check that the server applied `vir`: one that ignores it would look like a router without any cost."""
    if setting.vir is None:
        return
    if record.tokens is None:
        raise EvaluationError(
            "The response has no X-DvD-Images header with the number of visual tokens. Is the server dvd-serve?"
        )
    full = record.uncompressed_tokens
    compressed = full * COMPRESSED_TILE_TOKENS // TILE_TOKENS
    low, high = {"off": (full, full), "all": (compressed, compressed)}.get(setting.name, (compressed, full))
    if not low <= record.tokens <= high:
        raise EvaluationError(
            f"An image of {full // TILE_TOKENS} tiles has {record.tokens} visual tokens with vir {dict(setting.vir)};"
            f" expected {low} to {high}. The server ignores vir, or its checkpoint has no router."
        )

"""A fake gateway with the OpenAI API, and helpers to ask it."""

import asyncio
import base64
import io
import math
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Self

import aiohttp
from aiohttp import web
from PIL import Image

from common.tiling import select_grid
from demo.evaluation.answers import AnswerFile, AnswerRecord
from demo.evaluation.client import Client, ask_all
from demo.evaluation.plan import SERVER_DEFAULT, ImageSetting, QuestionGroup
from demo.scenes.scene import Scene, Shape
from demo.scenes.style import Style
from demo.text.questions import Question

SCENE = Scene(1000, 500, "plain", (220, 220, 220), (Shape("square", "red", (10.0, 10.0, 90.0, 90.0)),))
SCENE_TILES = 3
"""Tiles of `SCENE`, the thumbnail included."""
_TIMEOUT_SECONDS = 20


class FakeGateway(threading.Thread):
    """A server on 127.0.0.1 that answers with `answer(question)` and reports visual tokens as the gateway does.

    A context manager.

    Attributes:
        bodies: Bodies of all chat requests.
        applies_vir: Whether the router setting of a request has an effect.
        failures: Responses to the next chat requests.
        max_in_flight: Largest number of concurrent requests.
        before_answer: Called for each chat request.
    """

    def __init__(self, answer: Callable[[str], str]) -> None:
        super().__init__(daemon=True)
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.applies_vir = True
        self.failures: list[web.Response] = []
        self.max_in_flight = 0
        self.before_answer: Callable[[], None] = lambda: None
        self.url = ""
        self._in_flight = 0
        self._loop: asyncio.AbstractEventLoop
        self._stopping: asyncio.Event
        self._ready = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        assert self._ready.wait(_TIMEOUT_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self.join(_TIMEOUT_SECONDS)

    def run(self) -> None:
        """Serve until the context ends."""
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/v1/models", _constant({"object": "list", "data": [{"id": "tiny", "object": "model"}]}))
        app.router.add_get("/version", _constant({"version": "9.9", "engine": "8.8"}))
        app.router.add_post("/v1/chat/completions", self._chat)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = "http://{}:{}".format(*runner.addresses[0][:2])
        self._ready.set()
        await self._stopping.wait()
        await runner.cleanup()

    async def _chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        self.before_answer()
        if self.failures:
            return self.failures.pop(0)
        self._in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self._in_flight)
        await asyncio.sleep(0.005)
        self._in_flight -= 1
        files = [base64.b64decode(part["image_url"]["url"].split(",")[1]) for part in _parts(body, "image_url")]
        vir = body.get("vir") if self.applies_vir else None
        tokens = sum(_visual_tokens(_tile_count(file), vir) for file in files)
        report = f"images={len(files)}; tiles=0; compressed=0; tokens={tokens}; reused=0"
        message = {"role": "assistant", "content": self.answer(question_text(body))}
        response = {"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        return web.json_response(response, headers={"X-DvD-Images": report} if files else {})


def question_text(body: dict[str, Any]) -> str:
    """The question of a request."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else str(_parts(body, "text")[0]["text"])


def make_groups(
    count: int, *questions: tuple[str, str], settings: tuple[ImageSetting, ...] = (SERVER_DEFAULT,)
) -> list[QuestionGroup]:
    """Groups of questions and answers about `SCENE`."""
    group = tuple(Question("count", text, answer) for text, answer in questions)
    return [QuestionGroup("router", i, group, (SCENE,), settings=settings) for i in range(count)]


def ask_groups(gateway: FakeGateway, groups: list[QuestionGroup], file: Path, concurrency: int = 2) -> list[AnswerRecord]:
    """Ask all questions, and return the answers with those that the file already has."""

    async def run() -> list[AnswerRecord]:
        async with aiohttp.ClientSession() as session:
            client = Client(session, gateway.url)
            await client.describe()
            with AnswerFile(file, client.model) as answers:
                await ask_all(client, "part", groups, answers, concurrency)
                return answers.records_of(groups)

    return asyncio.run(run())


def _constant(value: Any) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def respond(_: web.Request) -> web.Response:
        return web.json_response(value)

    return respond


def _tile_count(file: bytes) -> int:
    with Image.open(io.BytesIO(file)) as image:
        count = math.prod(select_grid(image.width, image.height, Style().tiling))
    return count + (count > 1)


def _visual_tokens(tiles: int, vir: dict[str, Any] | None) -> int:
    """In mode auto, more tokens for a higher absolute threshold."""
    if not vir or vir["mode"] == "off":
        return 256 * tiles
    compressed = tiles if vir["mode"] == "all" else round((tiles - 1) * (1 - vir.get("absolute_threshold", 0.5)))
    return 256 * tiles - 192 * int(compressed)


def _parts(body: dict[str, Any], kind: str) -> list[Any]:
    content = body["messages"][-1]["content"]
    return [part for part in content if part["type"] == kind] if isinstance(content, list) else []

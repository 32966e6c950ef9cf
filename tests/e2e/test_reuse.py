"""One key, one encode: through the gateway, two vision workers, a redis-server and a language worker that is started again."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tests.e2e.serving import EXACT, GOLDEN, Served, image_part, start, stop, wait_ready
from tests.ports import free_port
from tests.redis_server import redis_server

CHECKPOINT = GOLDEN / "flash-qwen3/checkpoint"
PICTURE = "wide_1300x800.jpg"
QUESTION = "What is this?"


@dataclass
class Stack:
    gateway: Served
    vision: list[Served]
    language: Served
    sink: list[str]  # arguments to start the language worker with

    def work(self) -> list[tuple[float, float]]:
        """Tiles looked at and bytes shipped, of each vision worker that runs."""
        return [
            (served.metric("dvd_vision_tiles_total"), served.metric("dvd_vision_delivered_bytes_total"))
            for served in self.vision
            if served.process.poll() is None
        ]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with redis_server(tmp_path_factory.mktemp("redis")) as redis:
        eyes = [f"127.0.0.1:{free_port()}" for _ in range(2)]
        vision = []
        for address in eyes:
            port = free_port()
            flags = (f"--listen={address}", f"--cache={redis.url}", f"--metrics-port={port}")
            vision.append(start("vision", CHECKPOINT, *flags, url=f"http://127.0.0.1:{port}"))
        sink, http, port = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}", free_port()
        arguments = ["language", str(CHECKPOINT), f"--listen={sink}", f"--http={http}", "--", *EXACT]
        workers = (f"--vision-workers={','.join(eyes)}", f"--language-workers={sink}")
        gateway = start("gateway", *workers, f"--port={port}", url=f"http://127.0.0.1:{port}")
        made = Stack(gateway, vision, start(*arguments), arguments)
        try:
            wait_ready(gateway)
            yield made
        finally:
            for served in (gateway, made.language, *vision):
                stop(served)


def ask(stack: Stack, question: str = QUESTION) -> str:
    answer = stack.gateway.chat(image_part(PICTURE), question, max_tokens=8)
    assert answer.status == 200, answer.text
    return str(answer.json["choices"][0]["message"]["content"])


def test_a_hundred_requests_with_one_image_are_one_encode(stack: Stack) -> None:
    with ThreadPoolExecutor(100) as callers:
        said = list(callers.map(lambda _: ask(stack), range(100)))
    assert len(set(said)) == 1
    (tiles, sent), (other_tiles, other_sent) = sorted(stack.work(), reverse=True)
    assert tiles == 7, "three by two, and the thumbnail"
    assert sent > 0
    assert (other_tiles, other_sent) == (0, 0)


def test_a_second_turn_and_another_question_ship_nothing(stack: Stack) -> None:
    before = stack.work()
    ask(stack, "What colour is it?")
    assert stack.work() == before


@pytest.mark.ends_servers
def test_a_restarted_language_worker_and_another_vision_worker_need_no_encode(stack: Stack) -> None:
    said = ask(stack)
    (first,) = [served for served in stack.vision if served.metric("dvd_vision_tiles_total")]
    stop(first)
    stop(stack.language)
    while stack.gateway.get("/health/ready").status == 200:
        time.sleep(0.2)
    stack.language = start(*stack.sink)
    wait_ready(stack.gateway)
    assert ask(stack) == said
    ((tiles, sent),) = stack.work()
    assert tiles == 0
    assert sent > 0

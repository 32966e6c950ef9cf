"""An image is encoded once: with two vision workers, a redis-server and a language worker that is restarted."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tests.e2e.conftest import CHECKPOINT, Golden
from tests.e2e.serving import Served, image_part, start, stop, text_part, wait_ready
from tests.ports import free_port
from tests.redis_server import redis_server

IMAGE = "wide_1300x800.jpg"
QUESTION = "What is this?"


@dataclass
class Stack:
    """A gateway and two vision workers with a shared cache, before the language worker of the golden servers."""

    gateway: Served
    vision: list[Served]
    golden: Golden

    def work(self) -> list[tuple[float, float]]:
        """Returns tiles encoded and bytes delivered, of each vision worker that runs."""
        return [
            (served.metric("dvd_vision_tiles_total"), served.metric("dvd_vision_delivered_bytes_total"))
            for served in self.vision
            if served.process.poll() is None
        ]

    def ask(self, question: str = QUESTION) -> str:
        """Returns the answer to a question about the image."""
        content = [image_part(IMAGE), text_part(question)]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0}
        # a client of its own: its keys are not those of other tests, nor of another stack before the same language worker
        response = self.gateway.post("/v1/chat/completions", body, Authorization=f"Bearer {self.gateway.url}")
        assert response.status == 200, response.text
        return str(response.json["choices"][0]["message"]["content"])


@pytest.fixture(scope="session")  # one of its tests runs after those of other files
def stack(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with redis_server(tmp_path_factory.mktemp("redis")) as redis:
        addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
        vision = []
        for address in addresses:
            port = free_port()
            options = (f"--listen={address}", f"--cache={redis.url}", f"--metrics-port={port}")
            vision.append(start("vision", CHECKPOINT, *options, url=f"http://127.0.0.1:{port}"))
        port = free_port()
        workers = (f"--vision-workers={','.join(addresses)}", f"--language-workers={golden.sink_at}")
        gateway = start("gateway", *workers, f"--port={port}", url=f"http://127.0.0.1:{port}")
        try:
            wait_ready(gateway)
            yield Stack(gateway, vision, golden)
        finally:
            for served in (gateway, *vision):
                stop(served)


def test_a_hundred_requests_with_one_image_are_one_encode(stack: Stack) -> None:
    with ThreadPoolExecutor(100) as clients:
        answers = list(clients.map(lambda _: stack.ask(), range(100)))
    assert len(set(answers)) == 1
    (tiles, delivered), (other_tiles, _) = sorted(stack.work(), reverse=True)  # which may deliver what is in the shared cache
    assert tiles == 7, "three by two tiles and the thumbnail"
    assert delivered > 0
    assert other_tiles == 0


def test_another_question_delivers_nothing(stack: Stack) -> None:
    stack.ask()
    before = stack.work()
    stack.ask("What colour is it?")
    assert stack.work() == before


@pytest.mark.ends_servers
def test_a_restarted_language_worker_and_another_vision_worker_need_no_encode(stack: Stack) -> None:
    answer = stack.ask()
    (first,) = [served for served in stack.vision if served.metric("dvd_vision_tiles_total")]
    stop(first)
    stop(stack.golden.language)
    while stack.gateway.get("/health/ready").status == 200:
        time.sleep(0.2)
    stack.golden.language = start(*stack.golden.language_arguments)
    wait_ready(stack.gateway)
    assert stack.ask() == answer
    ((tiles, delivered),) = stack.work()
    assert tiles == 0
    assert delivered > 0

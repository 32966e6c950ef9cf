"""Narrow embeddings through all processes: answers are those of the widened values, and fewer bytes are stored."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from common.embedding import HEADER_SIZE, Header
from lm_worker.connector import load_embedding
from lm_worker.shared_memory import folder_of, read_header
from server.apis.request import embedding_part
from tests.e2e.conftest import CHECKPOINT, Golden
from tests.e2e.serving import EXACT, Served, image_part, request, start, stop, text_part, wait_ready
from tests.ports import free_port
from vision_worker.delivery import SinkChannels

IMAGES = ("wide_1300x800.jpg", "vga_640x480.png", "square.png")
QUESTION = "What is this?"
WIDTH = 128


@dataclass
class Narrow:
    """A gateway and a language worker that takes int8, with the vision worker of the golden servers."""

    gateway: Served
    folder: Path


@pytest.fixture(scope="module")
def narrow(flash: Golden) -> Iterator[Narrow]:
    sink, http, port = (f"127.0.0.1:{free_port()}" for _ in range(3))
    language = start("language", CHECKPOINT, f"--listen={sink}", f"--http={http}", "--embedding-dtype=int8", "--", *EXACT)
    workers = (f"--vision-workers={flash.vision_at}", f"--language-workers={sink}")
    gateway = start("gateway", *workers, f"--port={port.rpartition(':')[2]}", url=f"http://{port}")
    try:
        wait_ready(gateway)
        yield Narrow(gateway, folder_of(sink))
    finally:
        stop(gateway)
        stop(language)


def ask(url: str, image: dict[str, Any]) -> list[int]:
    """Return the greedy tokens of a question about an image."""
    body = {
        "messages": [{"role": "user", "content": [image, text_part(QUESTION)]}], "max_tokens": 16, "temperature": 0,
        "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip
    answer = Served(None, url, Path()).post("/v1/chat/completions", body)  # type: ignore[arg-type]  # no process is needed
    assert answer.status == 200, answer.text
    return list(answer.json["choices"][0]["token_ids"])


async def deliver(sink: str, key: str, fingerprint: str, values: torch.Tensor) -> None:
    header = Header(key, fingerprint, "float32", *values.shape)
    async with SinkChannels() as sinks:
        await sinks.deliver(sink, header, values.contiguous().view(torch.uint8).numpy().data.cast("B"), 60)


def test_answers_are_those_of_the_widened_embeddings(flash: Golden, narrow: Narrow) -> None:
    """The other language worker computes the same model in the same dtype, and gets the widened values as its embeddings."""
    for image in IMAGES:
        before = set(narrow.folder.iterdir())
        tokens = ask(narrow.gateway.url, image_part(image))
        assert ask(narrow.gateway.url, image_part(image)) == tokens
        (file,) = set(narrow.folder.iterdir()) - before - {narrow.folder / ".waiting"}
        header = read_header(file)
        assert (header.dtype, header.width) == ("int8", WIDTH)
        assert file.stat().st_size == HEADER_SIZE + header.rows * (WIDTH + 4)
        asyncio.run(deliver(flash.sink_at, file.name, header.fingerprint, load_embedding(file, torch.float32)))
        assert ask(flash.vllm_url, embedding_part(file.name, header.rows)) == tokens


def test_the_description_names_both_dtypes(narrow: Narrow) -> None:
    metrics = request(f"{narrow.gateway.url}/metrics").text
    (model,) = [line for line in metrics.splitlines() if line.startswith("dvd_model_info{") and line.endswith(" 1.0")]
    assert 'dtype="float32"' in model, "it is the dtype in which the model computes"

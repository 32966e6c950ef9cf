"""Servers that tests share: one start of vLLM takes longer than all the requests of a file."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.e2e.serving import EXACT, GOLDEN, TOOLS, Served, start, start_up, stop, wait_ready
from tests.ports import free_port


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What ends a shared server comes last."""
    items.sort(key=lambda item: item.get_closest_marker("ends_servers") is not None)


@dataclass
class Golden:
    """The three golden checkpoints, served at once; flash's processes one by one over TCP, the others by `dvd up`."""

    flash: Served
    vision: Served
    language: Served
    vllm_url: str
    workers: tuple[str, ...]  # flash's, as flags of another gateway
    others: dict[str, Served]

    def __getitem__(self, name: str) -> Served:
        return self.flash if name == "flash-qwen3" else self.others[name]


@pytest.fixture(scope="session")
def golden() -> Iterator[Golden]:
    checkpoint = GOLDEN / "flash-qwen3/checkpoint"
    vision_at, sink_at, http_at = (f"127.0.0.1:{free_port()}" for _ in range(3))
    port = free_port()
    vision = start("vision", checkpoint, f"--listen={vision_at}")
    language = start("language", checkpoint, f"--listen={sink_at}", f"--http={http_at}", "--", *EXACT, *TOOLS)
    workers = (f"--vision-workers={vision_at}", f"--language-workers={sink_at}")
    flash = start("gateway", *workers, f"--port={port}", "--router-scope=request", url=f"http://127.0.0.1:{port}")
    others = {name: start_up(GOLDEN / name / "checkpoint", "--vision-workers=2") for name in ("vit300m-qwen2", "vit6b-llama")}
    made = Golden(flash, vision, language, f"http://{http_at}", workers, others)
    try:
        wait_ready(flash, *others.values())
        yield made
    finally:
        for served in (flash, *others.values(), vision, language):
            stop(served)

"""Servers that tests share, started before the first test so that they load while tests without vLLM run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.families import FamilyRun
from tests.e2e.serving import (
    COMPACT_TOOL_CALLS,
    EXACT,
    GOLDEN,
    ROOT,
    TOOLS,
    Served,
    start,
    start_up,
    stop,
    wait_ready,
)
from tests.ports import free_port

CHECKPOINT = GOLDEN / "flash-qwen3/checkpoint"
DEMO_CHECKPOINT = ROOT / "demo/checkpoint"
_OTHERS = ("vit300m-qwen2", "vit6b-llama")
_FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs these tests last, since their servers load meanwhile; those that end a shared server come at the very end.

    The demo and the families load while the golden servers are tested, and their tests come after those.
    """
    late = ("test_demo.py", "test_families.py")
    items.sort(
        key=lambda item: (
            _FOLDER in item.path.parents, item.get_closest_marker("ends_servers") is not None, item.path.name in late
        )
    )  # fmt: skip


@dataclass
class Golden:
    """The golden checkpoints, served at once.

    Attributes:
        flash: The gateway of flash-qwen3. Its processes are started one by one and listen on TCP.
        vision: The vision worker of flash-qwen3.
        language: The language worker of flash-qwen3.
        language_arguments: Arguments of `dvd` that start this language worker.
        vllm_url: The URL of this worker's vLLM server, for requests that bypass the gateway.
        vision_at: The address of the vision worker.
        sink_at: The address of the language worker's sink.
        others: Servers of the other checkpoints by name, started by `dvd up`; empty if no test needs them.
    """

    flash: Served
    vision: Served
    language: Served
    language_arguments: tuple[str, ...]
    vllm_url: str
    vision_at: str
    sink_at: str
    others: dict[str, Served]

    def __getitem__(self, name: str) -> Served:
        return self.flash if name == "flash-qwen3" else self.others[name]

    @property
    def workers(self) -> tuple[str, ...]:
        """The options of another gateway for the same workers."""
        return (f"--vision-workers={self.vision_at}", f"--language-workers={self.sink_at}")

    @classmethod
    def start(cls, others: Sequence[str], compact_tool_calls: bool) -> "Golden":
        """Starts flash-qwen3 and the other checkpoints with these names, and does not wait for them.

        Args:
            others: Names of the other checkpoints.
            compact_tool_calls: Whether flash-qwen3 writes forced tool calls as JSON without white space.
        """
        vision_at, sink_at, http_at = (f"127.0.0.1:{free_port()}" for _ in range(3))
        vision = start("vision", CHECKPOINT, f"--listen={vision_at}")
        language_arguments = ("language", str(CHECKPOINT), f"--listen={sink_at}", f"--http={http_at}", "--", *EXACT, *TOOLS)
        language = start(*language_arguments, environment=COMPACT_TOOL_CALLS if compact_tool_calls else None)
        workers = (f"--vision-workers={vision_at}", f"--language-workers={sink_at}")
        port = free_port()
        flash = start("gateway", *workers, f"--port={port}", "--router-scope=request", url=f"http://127.0.0.1:{port}")
        servers = {name: start_up(GOLDEN / name / "checkpoint", "--vision-workers=2") for name in others}
        return cls(flash, vision, language, language_arguments, f"http://{http_at}", vision_at, sink_at, servers)

    def stop(self) -> None:
        """Ends all processes."""
        for served in (self.flash, *self.others.values(), self.vision, self.language):
            stop(served)


_NEEDED = pytest.StashKey[set[str]]()
"""Fixtures of the selected tests."""
_GOLDEN = pytest.StashKey[Golden]()
_FAMILIES = pytest.StashKey[FamilyRun]()
_DEMO = pytest.StashKey[Served]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Starts the golden servers if a test needs them, except in pytest-xdist's workers: each would start its own."""
    needed = session.config.stash[_NEEDED] = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    if session.config.option.collectonly or hasattr(session.config, "workerinput"):
        return
    if needed & {"golden", "flash"}:
        _golden(session.config)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Ends what was started, also after an interrupt and where no test came to use it."""
    stash = session.config.stash
    for server in (stash.get(_GOLDEN, None), stash.get(_FAMILIES, None)):
        if server:
            server.stop()
    if _DEMO in stash:
        stop(stash[_DEMO])


def _golden(config: pytest.Config) -> Golden:
    if _GOLDEN not in config.stash:
        config.stash[_GOLDEN] = Golden.start(
            _OTHERS if "golden" in config.stash[_NEEDED] else (),
            compact_tool_calls="compact_tool_calls" in config.stash[_NEEDED],
        )
    return config.stash[_GOLDEN]


def _family_run(config: pytest.Config) -> FamilyRun:
    if _FAMILIES not in config.stash:
        config.stash[_FAMILIES] = FamilyRun.start()
    return config.stash[_FAMILIES]


def _demo(config: pytest.Config) -> Served:
    if _DEMO not in config.stash:
        # its tests send more images at once than two cores encode in the usual 4 s
        config.stash[_DEMO] = start_up(DEMO_CHECKPOINT, "--max-queue-seconds=600")
    return config.stash[_DEMO]


@pytest.fixture(scope="session")
def golden(flash: Golden) -> Golden:
    """The servers of all golden checkpoints, ready."""
    return flash


@pytest.fixture(scope="session")
def flash(pytestconfig: pytest.Config) -> Golden:
    """The golden servers that the tests need, flash-qwen3 at least, ready. What else the tests need loads from now on."""
    servers = _golden(pytestconfig)
    wait_ready(servers.flash, *servers.others.values())
    for fixture, start_server in (("demo", _demo), ("family_run", _family_run)):
        if fixture in pytestconfig.stash[_NEEDED]:
            start_server(pytestconfig)
    return servers


@pytest.fixture(scope="session")
def demo(pytestconfig: pytest.Config) -> Served:
    """The bundled checkpoint, ready."""
    served = _demo(pytestconfig)
    wait_ready(served)
    return served


@pytest.fixture(scope="session")
def family_run(pytestconfig: pytest.Config) -> FamilyRun:
    """The run of all families' checkpoints."""
    return _family_run(pytestconfig)


@pytest.fixture(scope="session")
def compact_tool_calls(flash: Golden) -> None:
    """Lets flash-qwen3 write forced tool calls without white space, so that its random weights end them."""


@pytest.fixture(scope="session")
def served(flash: Golden) -> Served:
    """The gateway of flash-qwen3."""
    return flash.flash

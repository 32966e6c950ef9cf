"""Every entry point runs with only the packages that its container image has."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "tests/data/golden/flash-qwen3/checkpoint"
PACKAGES = {"server", "vision_worker", "lm_worker", "protos", "common", "dvd", "demo", "benchmarks", "tests"}
IMAGES = ("gateway", "vision", "language")
START_TIMEOUT_SECONDS = 120

DVD = ["-c", "from dvd.cli import main; main()"]

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""
"""A sitecustomize module. Blocking works also where an editable install would find the packages."""


def packages_in(image: str) -> set[str]:
    text = (ROOT / f"deploy/{image}.Dockerfile").read_text()
    return set(re.findall(r"^COPY (\w+) \1$", text, re.MULTILINE)) - {"constraints"}


class Image:
    """The Python packages of one container image."""

    def __init__(self, name: str, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(BLOCKER.format(absent=PACKAGES - packages_in(name)))
        variables = {k: v for k, v in os.environ.items() if not k.startswith("DVD_")}
        self._folder = folder
        self._environment = {**variables, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}

    def run(self, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=self._folder, env=self._environment, capture_output=True, text=True,
            timeout=START_TIMEOUT_SECONDS, check=False,
        )  # fmt: skip

    @contextlib.contextmanager
    def started(self, *arguments: str | Path) -> Iterator["subprocess.Popen[str]"]:
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)], cwd=self._folder, env=self._environment, stderr=subprocess.PIPE, text=True
        )
        try:
            yield process
            process.terminate()
            assert process.wait(30) in (0, -signal.SIGTERM), "uvicorn ends by the signal"
        finally:
            process.kill()
            process.wait()
            assert process.stderr is not None
            process.stderr.close()


def wait_for_line(process: "subprocess.Popen[str]", pattern: str) -> "re.Match[str]":
    """Read stderr until a line matches. The timeout of the test bounds it."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if match := re.search(pattern, line):
            return match
    raise AssertionError("".join(lines))


def test_an_image_has_one_process_and_what_all_share() -> None:
    shared = {"protos", "common", "dvd"}
    assert [packages_in(image) - shared for image in IMAGES] == [{"server"}, {"vision_worker"}, {"lm_worker"}]
    assert all(shared < packages_in(image) for image in IMAGES)


def test_the_gateway_answers_health_checks(tmp_path: Path) -> None:
    image = Image("gateway", tmp_path / "image")
    workers = [f"--vision-workers=unix:{tmp_path}/v", f"--language-workers=unix:{tmp_path}/l"]
    with image.started("-m", "server", "--port=0", *workers) as gateway:
        url = wait_for_line(gateway, r"listening on (http://\S+)")[1]
        live, ready = (image.run(*DVD, "health", f"{url}/health/{name}") for name in ("live", "ready"))
    assert (live.returncode, live.stdout) == (0, f"{url}/health/live: 200\n")
    assert ready.returncode == 1
    assert "503" in ready.stderr


def test_a_vision_worker_answers_health_checks(tmp_path: Path) -> None:
    image = Image("vision", tmp_path / "image")
    address = f"unix:{tmp_path}/vision"
    arguments: list[str | Path] = ["-m", "vision_worker", CHECKPOINT, "--vision-backend=fake", "--device=cpu"]
    arguments.append(f"--listen={address}")
    with image.started(*arguments) as worker:
        wait_for_line(worker, "ready on")
        health = image.run(*DVD, "health", address)
    assert health.returncode == 0, health.stderr
    assert health.stdout.startswith(f"{address}: vision worker of InternVL 3.5 Flash")


@pytest.mark.parametrize(
    ("image", "module", "arguments"),
    [
        ("gateway", "server", ["--vision-workers=a:1", "--language-workers=b:1"]),
        ("vision", "vision_worker", [str(CHECKPOINT)]),
        ("language", "lm_worker", [str(CHECKPOINT)]),
    ],
)
def test_help_and_configuration_are_printed(tmp_path: Path, image: str, module: str, arguments: list[str]) -> None:
    container = Image(image, tmp_path / "image")
    text = container.run(*DVD, image, "--help")
    assert text.stdout.startswith(f"usage: dvd {image}"), text.stderr
    configuration = container.run("-m", module, *arguments, "--print-config")
    assert json.loads(configuration.stdout)["log_level"] == "info", configuration.stderr


@pytest.mark.parametrize("image", IMAGES)
def test_describe_runs_in_every_image(tmp_path: Path, image: str) -> None:
    result = Image(image, tmp_path / "image").run(*DVD, "describe", CHECKPOINT)
    assert json.loads(result.stdout)["family"] == "InternVL 3.5 Flash", result.stderr


@pytest.mark.parametrize(
    ("image", "command", "message"),
    [
        ("gateway", "vision", "dvd vision: not installed here: package vision_worker"),
        ("vision", "gateway", "dvd gateway: not installed here: package server"),
        ("vision", "up", "dvd up: not installed here: package"),
    ],
)
def test_a_command_that_an_image_lacks_is_one_line(tmp_path: Path, image: str, command: str, message: str) -> None:
    result = Image(image, tmp_path / "image").run(*DVD, command, CHECKPOINT)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert result.stderr.startswith(message)

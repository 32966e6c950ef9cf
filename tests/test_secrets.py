"""Secrets appear in no output, response, metric or command line of real processes, whatever the log level."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.options import PREFIX, secret_names
from tests.option_classes import COMMANDS
from tests.server.fakes.file_server import file_server
from tests.server.fakes.gateway import start_gateway
from tests.server.fakes.handlers import error_response, respond_with
from tests.server.fakes.requests import chat, image_file, image_part, text_part
from tests.server.fakes.stack import start_stack

ROOT = Path(__file__).parents[1]
CHECKPOINT = str(ROOT / "tests/data/golden/flash-qwen3/checkpoint")
API_KEY = "sk-hidden-of-the-server"
MODULES = {"gateway": "server", "vision": "vision_worker", "language": "lm_worker"}
REQUIRED = {
    "up": [CHECKPOINT], "gateway": ["--vision-workers=a:1", "--language-workers=b:1"], "vision": [CHECKPOINT],
    "language": [CHECKPOINT],
}  # fmt: skip
SECRET_OPTIONS = [(command, name) for command in REQUIRED for name in secret_names(COMMANDS[command])]
CACHES = {
    "redis://:pw-hidden@127.0.0.1:1/0": "redis://***@127.0.0.1:1/0",
    "rediss://user:pw-hidden@127.0.0.1:1/0": "rediss://***@127.0.0.1:1/0",
    "redis://127.0.0.1:1/0?password=pw-hidden": "redis://127.0.0.1:1/0?password=***",
}


def run(command: str, *flags: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run `dvd COMMAND` as its image does."""
    environment = {**{k: v for k, v in os.environ.items() if not k.startswith(PREFIX)}, **variables, "PYTHONPATH": str(ROOT)}
    program = ["-c", "from dvd.cli import main; main()", command]
    arguments = [sys.executable, *program, *REQUIRED[command], *flags]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_the_api_key_counts_as_secret_in_every_command_that_has_it() -> None:
    commands = {command for command, options in COMMANDS.items() if "api_key" in options.model_fields}
    assert commands == {command for command, options in COMMANDS.items() if "api_key" in secret_names(options)}
    assert {"gateway", "up"} <= commands


@pytest.mark.parametrize(("command", "name"), SECRET_OPTIONS)
def test_a_secret_option_is_not_printed(command: str, name: str) -> None:
    variable = PREFIX + name.upper()
    printed = run(command, "--print-config", **{variable: "sk-hidden"})
    assert json.loads(printed.stdout)[name], printed.stderr
    invalid = run(command, "--log-level=debug", "--request-timeout=-1" if command != "vision" else "--max-image-pixels=-1",
                  **{variable: "sk-hidden \N{SNOWMAN}"})  # fmt: skip
    assert invalid.returncode == 2
    assert "hidden" not in printed.stdout + printed.stderr + invalid.stdout + invalid.stderr


@pytest.mark.parametrize(("url", "shown"), CACHES.items())
def test_the_password_of_the_cache_is_not_printed(url: str, shown: str) -> None:
    for command in ("vision", "up"):
        result = run(command, "--print-config", DVD_CACHE=url)
        assert json.loads(result.stdout)["cache"] == shown, result.stderr
        broken = run(command, "--log-level=debug", DVD_CACHE=f"mysql{url}")
        assert broken.returncode == 2
        assert "hidden" not in result.stdout + result.stderr + broken.stdout + broken.stderr


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def requests_with_secrets(url: str) -> dict[str, tuple[dict[str, Any], dict[str, str]]]:
    """Return requests by name: the arguments of aiohttp, and the headers. Every secret in them contains `hidden`."""
    good, path = {"Authorization": f"Bearer {API_KEY}"}, "/v1/chat/completions"

    def post(*content: Any, headers: dict[str, str] = good, **fields: Any) -> tuple[dict[str, Any], dict[str, str]]:
        return {"method": "POST", "path": path, "json": chat(*content, **fields)}, headers

    def image(link: str) -> tuple[dict[str, Any], dict[str, str]]:
        return post(image_part(link), text_part("hidden prompt"))

    return {
        "text": post("hidden prompt"),
        "stream": post("hidden prompt", stream=True),
        "image": post(image_part(image_file()), text_part("hidden prompt")),
        "wrong key": post("a", headers={"Authorization": "Bearer sk-hidden-wrong"}),
        "basic credentials": post("a", headers={"Authorization": "Basic dXNlcjpoaWRkZW4= hidden"}),
        "wrong x-api-key": post("a", headers={"x-api-key": "sk-hidden-wrong"}),
        "key in another scheme": post("a", headers={"Authorization": f"Token {API_KEY}"}),
        "signed image": image(f"{url}/image?signature=hidden"),
        "signed image that is gone": image(f"{url}/gone?signature=hidden"),
        "signed image of a dead server": image("http://127.0.0.1:1/a.png?token=hidden"),
        "signed text": image(f"{url}/text?token=hidden"),
        "redirect to credentials": image(f"{url}/redirect"),
        "image with credentials": image(f"{url.replace('//', '//user:pw-hidden@')}/image"),
        "credentials and a wide at sign": image("https://user:pw-hidden\N{FULLWIDTH COMMERCIAL AT}example.org/image"),
        "unknown scheme": image("ftp://user:pw-hidden@example.org/image?token=hidden"),
        "unknown route": ({"method": "GET", "path": "/v1/unknown?token=hidden"}, good),
        "key in the query": ({"method": "GET", "path": f"/v1/models?api_key={API_KEY}"}, {}),
        "invalid JSON": ({"method": "POST", "path": path, "data": b'{"model": "hidden'}, good),
        "invalid id": ({"method": "GET", "path": "/v1/models"}, {**good, "X-Request-Id": "hidden id"}),
        "wrong type": ({"method": "POST", "path": path, "json": {"messages": "hidden"}}, good),
    }


@pytest.mark.parametrize("flags", [["--workers=1"], ["--workers=2", "--log-format=json"]], ids=["text", "json"])
async def test_a_gateway_shows_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    async with start_stack(tmp_path) as stack:
        monkeypatch.setenv("DVD_API_KEY", API_KEY)
        files = file_server(
            image=respond_with(image_file(3)), gone=respond_with(b"", 404), text=respond_with(b"hidden"),
            redirect=respond_with(b"", 302, Location="ftp://user:pw-hidden@example.org/?token=hidden"),
        )  # fmt: skip
        async with files as url, start_gateway(stack, "--log-level=debug", "--allow-private-images", *flags) as gateway:
            statuses, shown = {}, {}
            for name, (arguments, headers) in requests_with_secrets(url).items():
                response = await gateway.request(**arguments, headers=headers)
                statuses[name] = response.status
                shown[name] = f"{response.headers}{response.body.decode()}"
            stack.engine.respond = error_response(500, "/root/model.py hidden")
            failed = await gateway.chat("hidden prompt", headers={"Authorization": f"Bearer {API_KEY}"})
            shown["failure"] = failed.body.decode()
            shown["metrics"] = (await gateway.get("/metrics")).body.decode()
            shown["ready"] = (await gateway.get("/health/ready")).body.decode()
            processes = [gateway.process.pid, *gateway.serving_pids()]
            shown["command lines"] = "".join(command_line(pid) for pid in processes)
            gateway.process.terminate()
            _, shown["log"] = await gateway.wait_until_ended()
    shown["output"] = "".join(capfd.readouterr())
    assert [name for name, text in shown.items() if "hidden" in text] == []
    assert {name for name, status in statuses.items() if status == 200} == {
        "text",
        "stream",
        "image",
        "signed image",
        "invalid id",
    }
    assert {status for status in statuses.values() if status >= 500} == set()
    assert shown["log"].count("answered") >= len(statuses), "the log level shows every request"
    assert len(processes) == (3 if "--workers=2" in flags else 1)

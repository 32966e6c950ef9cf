"""Real processes over TCP with a cluster token and TLS: requests are served, and strangers are not."""

import json
import re
import signal
import ssl
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common import errors
from common.http_get import http_request
from common.security import OPEN, Credentials
from tests.certificates import Authority
from tests.e2e.conftest import CHECKPOINT
from tests.e2e.serving import EXACT, START_TIMEOUT, image_part, run, start, stop, text_part
from tests.ports import free_port

TOKEN = "a-token-of-this-cluster"


class Cluster:
    """A gateway, a vision worker and a language worker, started one by one."""

    def __init__(self, folder: Path) -> None:
        authority = Authority(folder)
        self.credentials = Credentials(TOKEN, authority.issue("peer"))
        tls = self.credentials.tls
        assert tls is not None
        self.flags = (f"--tls-cert={tls.cert}", f"--tls-key={tls.key}", f"--tls-ca={tls.ca}")
        self.environment = {"DVD_CLUSTER_TOKEN": TOKEN}
        vision, sink, self.http, gateway = (f"127.0.0.1:{free_port()}" for _ in range(4))
        self.url = f"https://{gateway}"
        self._context = ssl.create_default_context(cafile=str(tls.ca))
        commands: dict[str, tuple[str, ...]] = {
            "vision": (str(CHECKPOINT), f"--listen={vision}", *self.flags),
            "language": (
                str(CHECKPOINT), f"--listen={sink}", f"--http={self.http}", *self.flags, "--log-format=json", "--", *EXACT
            ),
            "gateway": (
                f"--vision-workers={vision}", f"--language-workers={sink}", f"--port={gateway.rpartition(':')[2]}", *self.flags
            ),
        }  # fmt: skip
        self.addresses = (vision, sink)
        # a process without a home folder has to start too
        environment = {**self.environment, "HOME": "/proc/home"}
        self.served = {name: start(name, *words, environment=environment) for name, words in commands.items()}

    def chat(self, *content: Any) -> dict[str, Any]:
        """Send one user message and return the response."""
        body = json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0}).encode()
        request = urllib.request.Request(f"{self.url}/v1/chat/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120, context=self._context) as response:
            answer: dict[str, Any] = json.load(response)
            return answer

    def is_ready(self) -> bool:
        """Return whether the gateway is ready."""
        try:
            with urllib.request.urlopen(f"{self.url}/health/ready", timeout=10, context=self._context) as response:
                return bool(response.status == 200)
        except OSError:
            return False


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while not cluster.is_ready():
            ended = [served.lines for served in cluster.served.values() if served.process.poll() is not None]
            assert not ended, ended
            assert time.monotonic() < deadline, [served.lines[-3000:] for served in cluster.served.values()]
            time.sleep(0.5)
        yield cluster
    finally:
        for served in cluster.served.values():
            stop(served)


def test_requests_with_images_are_served(cluster: Cluster) -> None:
    answer = cluster.chat(image_part("square.png"), text_part("What is this?"))
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == 256
    assert not any(TOKEN in served.lines for served in cluster.served.values())


def test_vllms_port_demands_token_and_certificate(cluster: Cluster) -> None:
    certificate_alone = Credentials(None, cluster.credentials.tls)
    for path in ("/v1/models", "/tokenize", "/version", "/load"):
        assert http_request("GET", cluster.http, path, 30, certificate_alone)[0] == 401
    for path in ("/health", "/metrics"):
        assert http_request("GET", cluster.http, path, 30, certificate_alone)[0] == 200
    with pytest.raises(errors.Unavailable):
        http_request("GET", cluster.http, "/v1/models", 30, OPEN)
    assert http_request("GET", cluster.http, "/v1/models", 30, cluster.credentials)[0] == 200


def test_dvd_health_needs_token_and_certificate(cluster: Cluster) -> None:
    for address in cluster.addresses:
        assert run("health", address, *cluster.flags, environment=cluster.environment)[0] == 0
        status, text = run("health", address, *cluster.flags)
        assert (status, "cluster token" in text) == (1, True), text
        assert run("health", address, environment=cluster.environment)[0] == 1


@pytest.mark.parametrize("command", ["vision", "language"])
def test_a_worker_that_others_reach_does_not_start_without_them(command: str) -> None:
    status, text = run(command, CHECKPOINT, f"--listen=0.0.0.0:{free_port()}")
    assert (status, len(text.splitlines())) == (2, 1), text
    assert "other machines can reach it" in text
    assert "--insecure" in text


def test_a_start_and_a_stop_name_their_phases_without_noise_of_libraries(cluster: Cluster) -> None:
    """The output of the language worker is JSON down to the last line."""
    worker = cluster.served["language"]
    served = len(worker.lines.splitlines())
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(60) == 0
    records = [json.loads(line) for line in worker.lines.splitlines()]
    messages = [record["message"] for record in records]
    phases = ["loading vLLM", "starting the engine", "reading weights", "starting the HTTP server"]
    assert [message for message in messages if message in phases] == phases
    (ready,) = [message for message in messages if message.startswith("ready on")]
    assert re.search(r"after [\d.]+ s \(loading vLLM [\d.]+ s, starting the engine [\d.]+ s, ", ready)
    quiet = records[: messages.index(ready)] + records[served:]  # in between, strangers have connected
    by_libraries = [record["message"] for record in quiet if not record["logger"].startswith("dvd")]
    own_settings = ("Enforce eager set", "Inductor compilation was disabled by user settings", "Found ulimit of")
    assert [message for message in by_libraries if not message.startswith(own_settings)] == []

"""Strangers at the listeners of a worker for operators, over real sockets: admin and metrics."""

import contextlib
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from prometheus_client import CollectorRegistry, Gauge

from common import small_http
from common.admin import AdminServer
from common.http_get import http_request
from common.metrics import serve_metrics
from tests.ports import free_port

STRANGERS = 2000


def serve_admin() -> contextlib.AbstractContextManager[str]:
    @contextlib.contextmanager
    def serve() -> Iterator[str]:
        address = f"127.0.0.1:{free_port()}"
        with AdminServer(address, int, lambda: {"status": "serving"}):
            yield address

    return serve()


@contextlib.contextmanager
def serve_some_metrics() -> Iterator[str]:
    registry, port = CollectorRegistry(), free_port()
    Gauge("a_gauge", "A value", registry=registry).set(1)
    serve_metrics(registry, port)
    yield f"127.0.0.1:{port}"


LISTENERS = {"admin": (serve_admin, "/admin/status"), "metrics": (serve_some_metrics, "/metrics")}


@pytest.fixture(params=LISTENERS)
def listener(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """Address and path of a good request."""
    serve, path = LISTENERS[request.param]
    with serve() as address:
        yield address, path


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4 * STRANGERS), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)))


def assert_serves(address: str, path: str) -> None:
    assert http_request("GET", address, path, 60)[0] == 200


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.01)


@pytest.mark.parametrize("data", [b"", b"GET /metrics HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nContent-Length: 9\r\n\r\n"])
def test_silent_connections_cost_few_threads_and_keep_nobody_out(
    listener: tuple[str, str], many_descriptors: None, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    monkeypatch.setattr(small_http, "_REQUEST_SECONDS", 600.0)
    assert_serves(*listener)
    wait_until(lambda: not _request_threads(), "the good request has ended")
    descriptors = len(os.listdir("/proc/self/fd"))
    most = 0
    with contextlib.ExitStack() as strangers:
        for i in range(STRANGERS):
            strangers.enter_context(connect(listener[0])).sendall(data)
            if i % 50 == 0:
                assert_serves(*listener)
            most = max(most, len(_request_threads()))
        assert_serves(*listener)
    assert 1 < most <= small_http.MAX_REQUESTS
    wait_until(lambda: not _request_threads(), "all threads have ended")
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors, "all descriptors are closed")
    assert_serves(*listener)


def _request_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "process_request_thread" in thread.name]


def test_a_request_that_has_arrived_is_kept_before_those_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_http, "_REQUEST_SECONDS", 600.0)
    address, may_answer, asked = f"127.0.0.1:{free_port()}", threading.Event(), threading.Event()

    def status() -> dict[str, str]:
        asked.set()
        assert may_answer.wait(60)
        return {"status": "serving"}

    with AdminServer(address, int, status), contextlib.ExitStack() as strangers:
        good = strangers.enter_context(connect(address))
        good.sendall(b"GET /admin/status HTTP/1.1\r\n\r\n")
        assert asked.wait(60)
        waiting = [strangers.enter_context(connect(address)) for _ in range(3 * small_http.MAX_REQUESTS)]
        assert waiting[0].recv(1) == b"", "the oldest one has given way"
        may_answer.set()
        good.settimeout(60)
        assert good.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_clients_that_read_nothing_give_way_when_no_other_one_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_http, "_REQUEST_SECONDS", 600.0)
    address = f"127.0.0.1:{free_port()}"
    with AdminServer(address, int, lambda: {"x": "x" * (64 << 20)}), contextlib.ExitStack() as strangers:
        for _ in range(small_http.MAX_REQUESTS):
            strangers.enter_context(connect(address)).sendall(b"GET /admin/status HTTP/1.1\r\n\r\n")
        wait_until(lambda: len(_request_threads()) == small_http.MAX_REQUESTS, "all of them are being answered")
        assert http_request("POST", address, "/admin/drain", 60)[0] == 202


@pytest.mark.parametrize(
    ("request_line", "status"),
    [("GET / HTTP/1.1", 200), ("POST /metrics HTTP/1.1", 405), ("GET /metrics HTTP/9.1", 505), ("nonsense", 400)],
)
def test_metrics_answer_as_before(request_line: str, status: int) -> None:
    with serve_some_metrics() as address, connect(address) as connection:
        connection.sendall(f"{request_line}\r\nHost: a\r\n\r\n".encode())
        connection.settimeout(60)
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        assert (b"a_gauge 1.0" in answer) == (status == 200)


def test_metrics_are_compressed_on_demand_and_chosen_by_name() -> None:
    with serve_some_metrics() as address, connect(address) as connection:
        connection.sendall(
            b"GET /metrics?name[]=other HTTP/1.1\r\nAccept-Encoding: gzip\r\nAccept: application/openmetrics-text\r\n\r\n"
        )
        connection.settimeout(60)
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
        assert b"Content-Encoding: gzip" in answer
        assert b"Content-Type: application/openmetrics-text" in answer

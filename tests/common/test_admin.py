"""The admin listener, over real sockets."""

import contextlib
import json
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.admin import AdminServer
from common.http_get import http_request
from tests.ports import free_port


@pytest.fixture(params=["tcp", "ipv6", "unix"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    hosts = {"tcp": "127.0.0.1", "ipv6": "[::1]"}
    return f"{hosts[request.param]}:{free_port()}" if request.param in hosts else f"unix:{tmp_path}/admin"


class Process:
    """What an admin listener drains."""

    def __init__(self) -> None:
        self.drains = 0

    def drain(self) -> None:
        self.drains += 1

    def status(self) -> dict[str, Any]:
        return {"status": "serving", "processes": [1]}


@contextlib.contextmanager
def admin_server(address: str) -> Iterator[Process]:
    process = Process()
    with AdminServer(address, process.drain, process.status):
        yield process


def connect(address: str) -> socket.socket:
    if address.startswith("unix:"):
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address.removeprefix("unix:"))
        except OSError:
            connection.close()
            raise
        return connection
    host, _, port = address.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)))


def send_raw(address: str, data: bytes) -> tuple[int, Any]:
    """Send these bytes. Returns the status and the parsed body of the response."""
    with connect(address) as connection:
        connection.sendall(data)
        response = b"".join(iter(lambda: connection.recv(4096), b""))
    head, _, body = response.partition(b"\r\n\r\n")
    assert b"\r\nContent-Type: application/json\r\n" in head
    assert b"\r\nConnection: close" in head
    return int(head.split()[1]), json.loads(body)


def get(address: str, method: str, path: str) -> tuple[int, Any]:
    status, body = http_request(method, address, path, 60)
    return status, json.loads(body)


def test_a_drain_is_started_and_reported(address: str) -> None:
    with admin_server(address) as process:
        assert get(address, "GET", "/admin/status") == (200, {"status": "serving", "processes": [1]})
        assert process.drains == 0
        for _ in range(2):
            assert get(address, "POST", "/admin/drain") == (202, {"status": "draining"})
        assert process.drains == 2
        # the process itself may begin a moment later
        assert get(address, "GET", "/admin/status") == (200, {"status": "draining", "processes": [1]})
    with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
        connect(address)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404), ("GET", "/metrics", 404), ("POST", "/admin/drain/x", 404), ("GET", "/" + "x" * 9000, 404),
        ("GET", "/admin/drain", 405), ("HEAD", "/admin/drain", 405), ("POST", "/admin/status", 405),
        ("DELETE", "/admin/status", 405), ("BREW", "/admin/status", 405),
    ],
)  # fmt: skip
def test_everything_else_is_an_error_in_json(address: str, method: str, path: str, status: int) -> None:
    with admin_server(address) as process:
        answered, body = send_raw(address, f"{method} {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        assert answered == status
        assert list(body) == ["error"]
        assert process.drains == 0


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01 hello\r\n\r\n", 400),
        (b"POST /admin/drain HTTP/9.1\r\n\r\n", 505),
        (b"POST /admin/drain HTTP/1.1\r\nOrigin: http://evil.example\r\n\r\n", 403),
        (b"POST /admin/drain HTTP/1.1\r\nContent-Length: 999999999\r\n\r\n", 413),
        (b"POST /admin/drain HTTP/1.1\r\nA: " + b"x" * (17 << 10), 413),
    ],
)
def test_a_request_that_is_no_request_drains_nothing(address: str, data: bytes, status: int) -> None:
    with admin_server(address) as process:
        assert send_raw(address, data)[0] == status
        assert process.drains == 0


def test_a_body_is_read_and_ignored(address: str) -> None:
    with admin_server(address) as process:
        assert send_raw(address, b"POST /admin/drain HTTP/1.1\r\nContent-Length: 9000\r\n\r\n" + b"x" * 9000)[0] == 202
        assert process.drains == 1


@pytest.mark.parametrize(
    "data", [b"", b"POST /admin/drain HTTP/1.1\r\n", b"POST /admin/drain HTTP/1.1\r\nContent-Length: 9\r\n\r\n"]
)
def test_a_client_that_leaves_early_drains_nothing(address: str, data: bytes) -> None:
    with admin_server(address) as process:
        with connect(address) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(4096) == b""
        assert process.drains == 0


def test_slow_clients_hold_up_nobody_and_are_disconnected(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.small_http._REQUEST_SECONDS", 2.0)
    with admin_server(address) as process, contextlib.ExitStack() as connections:
        slow = [connections.enter_context(connect(address)) for _ in range(10)]
        for connection in slow:
            connection.sendall(b"POST /admin/drain HTTP/1.1\r\n")
        assert get(address, "GET", "/admin/status")[0] == 200
        for connection in slow:
            connection.settimeout(60)
            assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")
        assert process.drains == 0


def test_an_address_in_use_is_named(address: str) -> None:
    with admin_server(address), pytest.raises(OSError, match=r"cannot listen on .*in use by another process"):
        AdminServer(address, int, dict)


def test_the_socket_file_is_for_this_user_and_that_of_a_killed_process_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "admin"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    with admin_server(f"unix:{path}"):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert get(f"unix:{path}", "GET", "/admin/status")[0] == 200
    assert not path.exists()
    with pytest.raises(OSError, match="cannot listen on unix:.*/missing/admin: No such file"):
        AdminServer(f"unix:{tmp_path}/missing/admin", int, dict)


def test_it_answers_while_the_main_thread_is_busy(address: str) -> None:
    answers = []
    with admin_server(address):
        asking = threading.Thread(target=lambda: answers.append(get(address, "POST", "/admin/drain")))
        asking.start()
        asking.join(60)
    assert answers == [(202, {"status": "draining"})]

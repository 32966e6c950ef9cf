"""Slow heads, callers that read nothing, and the number of connections, over real sockets."""

import asyncio
import json
from contextlib import AsyncExitStack
from typing import Any

import pytest

from server.http import protocol
from server.http.connections import Connections
from server.metrics import Metrics
from tests.server.fakes.waiting import wait_until
from tests.server.http.test_protocol import GET, parse_error, respond_with_body_size, start_server

Client = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def connect(port: int, data: bytes = b"") -> Client:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    return reader, writer


async def read_to_end(client: Client) -> bytes:
    async with asyncio.timeout(20):
        data = await client[0].read()
    client[1].close()
    return data


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


@pytest.mark.parametrize("start", [b"GET /", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nX-Request-Id: mine\r\nX-Long: "])
async def test_a_head_that_does_not_arrive_in_time_is_answered_with_408(start: bytes) -> None:
    metrics = Metrics()
    async with start_server(connections=Connections(10, 0.3, metrics)) as port:
        client = await connect(port)
        for piece in (start, b"x", b"x"):
            client[1].write(piece)
            await asyncio.sleep(0.02)
        response = await read_to_end(client)
        error = parse_error(response)
        assert (error["status"], error["code"]) == (408, "request_too_slow")
        assert "0.3 s (--head-timeout)" in error["message"]
        assert (b"X-Request-Id: mine\r\n" in response) == (b"mine" in start)
        assert b"X-Request-Id: " in response
        assert sample(metrics, "dvd_requests_total", route="other", code="408") == 1
        assert sample(metrics, "dvd_errors_total", code="request_too_slow") == 1
        await wait_until(lambda: sample(metrics, "dvd_connections") == 0, "the connection is closed")


@pytest.mark.parametrize("drops", [b"", b"\r\n"], ids=["nothing", "line feeds"])
async def test_a_connection_without_a_request_is_closed(drops: bytes) -> None:
    async with start_server(connections=Connections(10, 0.3, Metrics())) as port:
        client = await connect(port)
        reading = asyncio.create_task(read_to_end(client))
        while not reading.done():
            client[1].write(drops)
            await asyncio.sleep(0.05)
        assert await reading == b""


async def test_line_feeds_do_not_keep_an_idle_connection_open() -> None:
    async with start_server(connections=Connections(10, 0.3, Metrics()), timeout_keep_alive=600) as port:
        client = await connect(port, GET + b"\r\n")
        reading = asyncio.create_task(read_to_end(client))
        while not reading.done():
            client[1].write(b"\r\n")
            await asyncio.sleep(0.05)
        assert (await reading).startswith(b"HTTP/1.1 200 ")


async def test_an_idle_connection_outlives_the_time_of_a_head_and_so_does_a_body() -> None:
    async with start_server(connections=Connections(10, 0.2, Metrics())) as port:
        client = await connect(port, GET + b"\r\n")
        await client[0].readuntil(b"00000000")
        await asyncio.sleep(0.5)
        client[1].write(b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 5\r\n\r\n")
        for _ in range(5):
            await asyncio.sleep(0.1)
            client[1].write(b"x")
        assert (await read_to_end(client)).endswith(b"00000005")


async def test_a_slow_second_head_does_not_end_the_first_response() -> None:
    may_answer = asyncio.Event()

    async def wait(scope: Any, receive: Any, send: Any) -> None:
        await may_answer.wait()
        await respond_with_body_size(scope, receive, send)

    async with start_server(wait, connections=Connections(10, 0.2, Metrics())) as port:
        client = await connect(port, GET + b"\r\nGET /second")
        await asyncio.sleep(0.5)
        may_answer.set()
        response = await read_to_end(client)
        assert response.startswith(b"HTTP/1.1 200 ")
        assert response.count(b"HTTP/1.1") == 1


async def test_a_caller_that_stops_in_a_body_that_was_answered_is_disconnected() -> None:
    async def answer(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 429, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async with start_server(answer, connections=Connections(10, 0.3, Metrics()), timeout_keep_alive=600) as port:
        head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n"
        assert (await read_to_end(await connect(port, head + b"x"))).startswith(b"HTTP/1.1 429 ")
        client = await connect(port, head + b"x")
        await client[0].readuntil(b"\r\n\r\n")
        client[1].write(b"xxxx")  # one that completes it may send another request later
        await asyncio.sleep(0.6)
        client[1].write(head)
        assert (await client[0].readline()).startswith(b"HTTP/1.1 429 ")
        client[1].close()


async def test_a_new_connection_takes_the_place_of_the_one_that_has_waited_longest() -> None:
    metrics = Metrics()
    async with start_server(connections=Connections(3, 60.0, metrics)) as port, AsyncExitStack() as stack:
        clients = []
        for data in (b"", GET, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nx"):
            clients.append(await connect(port, data))
            stack.callback(clients[-1][1].close)
            await asyncio.sleep(0.05)
        for old in clients:
            new = await connect(port, GET + b"\r\n")
            stack.callback(new[1].close)
            assert (await new[0].readline()).startswith(b"HTTP/1.1 200 ")
            assert await read_to_end(old) == b""
            assert sample(metrics, "dvd_connections") == 3
            await asyncio.sleep(0.05)
        assert sample(metrics, "dvd_requests_refused_total", resource="connections") is None


async def test_a_connection_beyond_the_limit_is_refused_while_all_others_are_served() -> None:
    metrics, may_answer = Metrics(), asyncio.Event()

    async def wait(scope: Any, receive: Any, send: Any) -> None:
        await may_answer.wait()
        await respond_with_body_size(scope, receive, send)

    async with start_server(wait, connections=Connections(2, 60.0, metrics)) as port:
        served = [await connect(port, GET + b"Connection: close\r\n\r\n") for _ in range(2)]
        await asyncio.sleep(0.1)
        response = await read_to_end(await connect(port, GET + b"\r\n"))
        error = parse_error(response)
        assert (error["status"], error["code"]) == (503, "unavailable")
        assert b"Retry-After: " in response
        assert sample(metrics, "dvd_requests_refused_total", resource="connections") == 1
        may_answer.set()
        for client in served:
            assert (await read_to_end(client)).startswith(b"HTTP/1.1 200 ")
        await wait_until(lambda: sample(metrics, "dvd_connections") == 0, "all connections are closed")


@pytest.mark.parametrize("close", [b"", b"Connection: close\r\n"])
async def test_a_short_response_that_nobody_reads_does_not_keep_its_connection(
    close: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last bytes wait in the server, fewer than those at which the application would be paused."""
    monkeypatch.setattr(protocol, "STALL_TIMEOUT_SECONDS", 0.3)
    metrics = Metrics()

    async def answer(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        size = 8 << 20
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
        await send({"type": "http.response.body", "body": bytes(size)})

    async with start_server(answer, connections=Connections(10, 60.0, metrics), timeout_keep_alive=600) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 12)
        writer.write(GET + close + b"\r\n")
        await wait_until(lambda: sample(metrics, "dvd_connections") == 1, "the connection is open")
        await wait_until(lambda: sample(metrics, "dvd_connections") == 0, "the connection is closed", 20)
        writer.close()
        del reader


async def test_a_caller_that_reads_slowly_but_steadily_gets_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "STALL_TIMEOUT_SECONDS", 0.4)
    monkeypatch.setattr(protocol, "MIN_READ_RATE", 1)
    size = 24 << 20

    async def answer(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
        await send({"type": "http.response.body", "body": bytes(size)})

    async with start_server(answer) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 16)
        writer.write(GET + b"\r\n")
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(24):
            assert len(await reader.readexactly(1 << 20)) == 1 << 20
            await asyncio.sleep(0.05)
        writer.close()


async def test_an_error_without_a_request_is_json_and_names_its_request() -> None:
    async with start_server() as port:
        response = await read_to_end(await connect(port, b"GET / HTTP/1.1\r\nX-Request-Id: mine\r\nHost: a\r\nbroken\r\n\r\n"))
        head, _, body = response.partition(b"\r\n\r\n")
        assert b"X-Request-Id: mine" in head
        assert json.loads(body)["error"]["code"] == "invalid_request"


class Waiting:
    """A connection that waits since a time, as `Connections` sees it."""

    def __init__(self, since: float) -> None:
        self.waiting_since, self.is_waiting_for_request, self.is_closed = since, True, False

    def give_way(self) -> None:
        self.is_closed = True


def test_the_order_in_which_connections_give_way_survives_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several are found at once; those that were served since, or began to wait anew, are not the oldest any more."""
    monkeypatch.setattr("server.http.connections._FOUND_AT_ONCE", 5)
    connections, all_of_them = Connections(8, 60.0, Metrics()), [Waiting(i) for i in range(8)]
    for connection in reversed(all_of_them):
        assert connections.add(connection)

    def closed_by_a_new_one(since: float) -> Waiting:
        before = {connection for connection in all_of_them if connection.is_closed}
        all_of_them.append(Waiting(since))
        assert connections.add(all_of_them[-1])
        (closed,) = {connection for connection in all_of_them if connection.is_closed} - before
        return closed

    assert closed_by_a_new_one(100).waiting_since == 0
    all_of_them[1].is_waiting_for_request = False  # it is being served
    all_of_them[2].waiting_since = 50  # it was, and is idle again
    connections.remove(all_of_them[3])
    all_of_them.append(Waiting(200))
    assert connections.add(all_of_them[-1])
    assert [closed_by_a_new_one(300 + i).waiting_since for i in range(5)] == [4, 5, 6, 7, 50]
    for connection in all_of_them:
        connection.is_waiting_for_request = False
    assert not connections.add(Waiting(1)), "all of them are served"

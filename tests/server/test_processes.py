"""How the gateway stops: real processes, signals and connections, with one process and with several."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.server.fakes.gateway import Gateway, is_refused, start_gateway
from tests.server.fakes.handlers import Handler, event_stream, hang
from tests.server.fakes.requests import chat
from tests.server.fakes.stack import Response, start_stack
from tests.server.fakes.vllm import COMPLETION, EVENTS, MODEL
from tests.server.fakes.waiting import wait_until

MESSAGE = {"model": MODEL, "max_tokens": 5, "messages": [{"role": "user", "content": "hello"}]}
START = b'event: message_start\ndata: {"type": "message_start"}\n\nevent: ping\ndata: {"type": "ping"}\n\n'
PROCESSES = pytest.mark.parametrize("processes", [1, 2])


@pytest.fixture
async def gateway(tmp_path: Path, processes: int, flags: list[str]) -> AsyncIterator[Gateway]:
    async with start_stack(tmp_path) as stack, start_gateway(stack, f"--workers={processes}", *flags) as running:
        await wait_until(lambda: len(running.serving_pids()) == (processes if processes > 1 else 0), "all processes run")
        yield running


async def ends_without_a_trace(gateway: Gateway, pids: list[int]) -> str:
    """Wait for exit status 0, and check that no process is left and no traceback was logged. Returns the log."""
    status, output = await gateway.wait_until_ended()
    assert status == 0, output
    assert "Traceback" not in output
    await wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "the processes are gone")
    return output


@PROCESSES
@pytest.mark.parametrize("flags", [["--shutdown-delay=600", "--shutdown-grace=600"]])
async def test_while_it_drains_it_serves_but_is_not_ready(gateway: Gateway) -> None:
    pids = gateway.serving_pids()
    reader, writer = await gateway.send_raw("GET /health/live HTTP/1.1\nHost: a\n\n")
    first = await reader.readuntil(b'"live"}')
    assert b"connection: close" not in first.lower()
    gateway.process.terminate()
    response = await gateway.wait_until_not_ready()
    assert response.json == {"status": "draining", "reasons": ["the gateway is shutting down"]}

    async def all_drain() -> bool:
        responses = await asyncio.gather(*(gateway.get("/health/ready") for _ in range(20)))
        return {response.status for response in responses} == {503}

    await wait_until(all_drain, "all processes drain")
    for response in (await gateway.get("/health/live"), await gateway.post(chat("hello"))):
        assert (response.status, response.headers["Connection"]) == (200, "close")
    writer.write(b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n")
    second = await asyncio.wait_for(reader.read(), 60)
    assert b"connection: close" in second.lower()
    assert second.endswith(b'"live"}'), "the connection ends after the response"
    writer.close()
    gateway.process.terminate()
    await ends_without_a_trace(gateway, pids)


@pytest.mark.parametrize(("processes", "number"), [(1, signal.SIGTERM), (2, signal.SIGTERM), (2, signal.SIGINT)])
@pytest.mark.parametrize("flags", [["--shutdown-delay=0", "--shutdown-grace=600"]])
async def test_running_requests_end_within_the_grace(gateway: Gateway, number: signal.Signals) -> None:
    may_end = asyncio.Event()

    async def rest(request: web.Request) -> web.StreamResponse:
        await may_end.wait()
        if (await request.json()).get("stream"):
            return await event_stream(*EVENTS)(request)
        return web.Response(body=COMPLETION, content_type="application/json")

    gateway.engine.respond = rest
    requests = [asyncio.create_task(gateway.post(chat("hello", stream=stream))) for stream in (True, False) * 5]
    await wait_until(lambda: len(gateway.engine.requests) == 10, "the engine has all requests")
    pids = gateway.serving_pids()
    for pid in (gateway.process.pid, *pids):  # as systemd does, and Ctrl-C: every process of the group gets it
        os.kill(pid, number)
    await wait_until(lambda: is_refused(gateway), "no connection is accepted")
    may_end.set()
    bodies = {(response.status, response.body) for response in await asyncio.gather(*requests)}
    assert bodies == {(200, COMPLETION), (200, b"".join(EVENTS))}
    await ends_without_a_trace(gateway, pids)


def respond_by_path(request: web.Request) -> Handler:
    """Hang, streams after their first events."""
    if request.headers["X-Request-Id"] != "stream":
        return hang
    return event_stream(START if "messages" in request.path else EVENTS[1], then=hang)


@PROCESSES
@pytest.mark.parametrize(
    ("flags", "signals"),
    [(["--shutdown-delay=0", "--shutdown-grace=0.5"], 1), (["--shutdown-grace=600", "--shutdown-delay=600"], 2)],
    ids=["end of the grace", "second signal"],
)
async def test_what_still_runs_then_ends_with_an_error(gateway: Gateway, signals: int) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        return await respond_by_path(request)(request)

    gateway.engine.respond = respond
    started = asyncio.Semaphore(0)

    async def stream(body: Any, path: str) -> bytes:
        async with aiohttp.ClientSession() as session:
            headers = {"X-Request-Id": "stream"}
            async with session.post(gateway.url + path, json={**body, "stream": True}, headers=headers) as response:
                assert response.status == 200
                started.release()
                return await response.read()

    async def wait(body: Any, path: str) -> Response:
        return await gateway.post(body, path=path)

    routes = [(chat("hello"), "/v1/chat/completions"), (MESSAGE, "/v1/messages")]
    streams = [asyncio.create_task(stream(*route)) for route in routes]
    waiting = [asyncio.create_task(wait(*route)) for route in routes]
    reader, writer = await gateway.send_raw("POST /v1/chat/completions HTTP/1.1\nHost: a\nContent-Length: 1000\n\n", b"{")
    for _ in streams:
        await started.acquire()
    await wait_until(lambda: len(gateway.engine.requests) == 4, "the engine has all requests")
    pids = gateway.serving_pids()
    for _ in range(signals):
        gateway.process.terminate()
        if signals > 1:
            await gateway.wait_until_not_ready()
    message = "The gateway is shutting down; retry."
    error = {"message": message, "type": "server_error", "param": None, "code": "unavailable"}
    chat_events, message_events = await asyncio.gather(*streams)
    assert chat_events == EVENTS[1] + b"data: " + json.dumps({"error": error}).encode() + b"\n\ndata: [DONE]\n\n"
    assert message_events.startswith(START + b"event: error\ndata: ")
    anthropic_error = {"type": "error", "error": {**error, "type": "overloaded_error"}}
    assert json.loads(message_events.removeprefix(START + b"event: error\ndata: ")) == anthropic_error
    assert message_events.endswith(b"\n\n")
    chat_response, message_response = await asyncio.gather(*waiting)
    assert (chat_response.json, message_response.json) == ({"error": error}, anthropic_error)
    for response in (chat_response, message_response):
        assert (response.status, response.headers["Connection"]) == (503, "close")
        assert int(response.headers["Retry-After"]) in range(1, 4)
    upload = await asyncio.wait_for(reader.read(), 60)
    writer.close()
    assert upload.startswith(b"HTTP/1.1 503 ")
    assert json.loads(upload.partition(b"\r\n\r\n")[2]) == {"error": error}
    await wait_until(lambda: gateway.engine.disconnects == 4, "the engine's requests are cancelled")
    output = await ends_without_a_trace(gateway, pids)
    assert "running requests end with an error" in output


@PROCESSES
@pytest.mark.parametrize("flags", [["--shutdown-delay=0", "--shutdown-grace=0.5"]])
async def test_a_caller_that_does_not_read_does_not_keep_it_running(gateway: Gateway) -> None:
    filler = b": " + b"x" * (1 << 20) + b"\n\n"
    gateway.engine.respond = event_stream(EVENTS[1], *[filler] * 40, then=hang)
    reader, writer = await gateway.start_chat(chat("hello", stream=True))
    await reader.readuntil(EVENTS[1])
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    pids = gateway.serving_pids()
    gateway.process.terminate()
    await ends_without_a_trace(gateway, pids)
    writer.close()


@pytest.mark.parametrize("processes", [2])
@pytest.mark.parametrize("flags", [["--shutdown-delay=0", "--shutdown-grace=600"]])
async def test_a_process_that_drains_alone_is_replaced(gateway: Gateway) -> None:
    drained, _ = gateway.serving_pids()
    os.kill(drained, signal.SIGTERM)
    await wait_until(lambda: len(gateway.serving_pids()) == 2 and drained not in gateway.serving_pids(), "a new process")
    await gateway.wait_until_ready()
    gateway.process.terminate()
    output = await ends_without_a_trace(gateway, [])
    assert f"process {drained} ended with 0; another one takes its place" in output


@pytest.mark.parametrize("processes", [2])
@pytest.mark.parametrize("flags", [["--shutdown-delay=0", "--shutdown-grace=600"]])
async def test_a_process_that_is_killed_while_draining_is_not_replaced(gateway: Gateway) -> None:
    gateway.engine.respond = hang
    requests = [asyncio.create_task(gateway.post(chat("hello"))) for _ in range(30)]
    await wait_until(lambda: len(gateway.engine.requests) == 30, "all requests are being served")
    pids = gateway.serving_pids()
    gateway.process.terminate()
    await wait_until(lambda: is_refused(gateway), "no connection is accepted")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    results = await asyncio.gather(*requests, return_exceptions=True)
    assert all(isinstance(result, aiohttp.ClientError) for result in results)
    await ends_without_a_trace(gateway, pids)

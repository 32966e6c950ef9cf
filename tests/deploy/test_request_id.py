"""One request through all processes: its id in every log, its stages in `Server-Timing`, and its content in no log."""

import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.deploy.processes import ENGINE_EVENTS, Processes, run_processes, wait_until
from tests.server.fakes.requests import chat, data_url, image_file, image_part, text_part

REQUEST_ID = "a-request.1"
PROMPT = "the prompt that no log may contain"
VARYING_FIELDS = ("time", "seconds", "tokens", "compressed", "tiles")
GATEWAY_STAGES = ["receive", "fetch", "lookup", "vision", "engine"]
STAGES = [*GATEWAY_STAGES, "wait", "decode", "tile", "queue", "encode", "route", "deliver", "total"]


@pytest.fixture(scope="module")
async def processes(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Processes]:
    async with run_processes(tmp_path_factory.mktemp("trail")) as running:
        yield running


async def send_request(processes: Processes, **fields: Any) -> dict[str, float]:
    """Return `Server-Timing` of a successful response: milliseconds by stage."""
    body = chat(image_part(image_file(7, (900, 700))), text_part(PROMPT), stream=True, **fields)
    headers = {"X-Request-Id": REQUEST_ID, "Authorization": "Bearer a-secret-key"}
    async with processes.session.post(f"{processes.url}/v1/chat/completions", json=body, headers=headers) as response:
        assert (response.status, await response.read()) == (200, b"".join(ENGINE_EVENTS))
        return {stage: float(ms) for stage, ms in re.findall(r"([a-z]+);dur=([\d.]+)", response.headers["Server-Timing"])}


async def test_logs_have_the_request_id_and_timings_but_no_content(processes: Processes) -> None:
    first = await send_request(processes)
    assert list(first) == STAGES
    assert first["vision"] >= first["encode"] > 0
    assert first["total"] >= first["vision"] + first["engine"]
    second = await send_request(processes)
    assert list(second) == [stage for stage in GATEWAY_STAGES if stage != "vision"] + ["total"], "nothing was encoded"

    async def is_logged() -> bool:  # the client has the response before the gateway logs it
        records = [record for record in processes.records("gateway") if record.get("cache")]
        logs = [processes.log(name) for name in processes.ports]
        return len(records) == 2 and all("dvd." in log and REQUEST_ID in log for log in logs)

    await wait_until(is_logged, lambda: "".join(map(processes.log, processes.ports)))
    access = [record for record in processes.records("gateway") if record["logger"] == "dvd.access" and "images" in record]
    assert [record["cache"] for record in access] == ["miss", "hit"]
    assert {name: value for name, value in access[0].items() if name not in VARYING_FIELDS} == {
        "level": "info", "logger": "dvd.access", "message": "answered", "request_id": REQUEST_ID,
        "route": "/v1/chat/completions", "status": 200, "images": 1, "reused": 0, "shared": 0, "encoded": 1, "cache": "miss",
    }  # fmt: skip
    (encode,) = [record for record in processes.records("vision") if record["logger"] == "dvd.encode"]
    assert (encode["request_id"], encode["outcome"], encode["images"]) == (REQUEST_ID, "encoded", 1)
    assert (encode["tiles"], encode["tokens"]) == (access[0]["tiles"], access[0]["tokens"])
    (delivery,) = [record for record in processes.records("sink") if record["message"] == "delivery"]
    assert (delivery["request_id"], delivery["outcome"]) == (REQUEST_ID, "stored")
    all_logs = "".join(map(processes.log, processes.ports))
    for secret in (PROMPT, "a-secret-key", data_url(image_file(7, (900, 700)))[30:60]):
        assert secret not in all_logs

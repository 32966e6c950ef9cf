"""One request through all processes: its id in each log, its times in the answer's head, and nothing of it anywhere else."""

import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.deploy.processes import ANSWER, Processes, running, until
from tests.server.fakes.requests import chat, data_url, image_file, image_part, text_part

NAME = "a-request.1"
SECRET = "the prompt that nobody reads"
VARIES = ("time", "seconds", "tokens", "compressed", "tiles")
OURS = ["receive", "fetch", "lookup", "vision", "engine"]
STAGES = [*OURS, "wait", "decode", "tile", "queue", "encode", "route", "deliver", "total"]


@pytest.fixture(scope="module")
async def processes(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Processes]:
    async with running(tmp_path_factory.mktemp("trail")) as made:
        yield made


async def asked(processes: Processes, **fields: Any) -> dict[str, float]:
    """Server-Timing of a good answer, milliseconds by stage."""
    body = chat(image_part(image_file(7, (900, 700))), text_part(SECRET), stream=True, **fields)
    headers = {"X-Request-Id": NAME, "Authorization": "Bearer a-secret-key"}
    async with processes.session.post(f"{processes.url}/v1/chat/completions", json=body, headers=headers) as answer:
        assert (answer.status, await answer.read()) == (200, b"".join(ANSWER))
        return {stage: float(ms) for stage, ms in re.findall(r"([a-z]+);dur=([\d.]+)", answer.headers["Server-Timing"])}


async def test_a_request_leaves_its_id_and_its_times_and_nothing_else(processes: Processes) -> None:
    first = await asked(processes)
    assert list(first) == STAGES
    assert first["vision"] >= first["encode"] > 0
    assert first["total"] >= first["vision"] + first["engine"]
    again = await asked(processes)
    assert list(again) == [stage for stage in OURS if stage != "vision"] + ["total"], "nothing was encoded"

    async def written() -> bool:  # the caller has the answer before the line is there
        lines = [record for record in processes.records("gateway") if record.get("cache")]
        logs = [processes.log(name) for name in processes.ports]
        return len(lines) == 2 and all("dvd." in log and NAME in log for log in logs)

    await until(written, lambda: "".join(map(processes.log, processes.ports)))
    access = [record for record in processes.records("gateway") if record["logger"] == "dvd.access" and "images" in record]
    assert [record["cache"] for record in access] == ["miss", "hit"]
    assert {name: value for name, value in access[0].items() if name not in VARIES} == {
        "level": "info", "logger": "dvd.access", "message": "answered", "request_id": NAME, "route": "/v1/chat/completions",
        "status": 200, "images": 1, "reused": 0, "shared": 0, "encoded": 1, "cache": "miss",
    }  # fmt: skip
    (encode,) = [record for record in processes.records("vision") if record["logger"] == "dvd.encode"]
    assert (encode["request_id"], encode["outcome"], encode["images"]) == (NAME, "encoded", 1)
    assert (encode["tiles"], encode["tokens"]) == (access[0]["tiles"], access[0]["tokens"])
    (delivery,) = [record for record in processes.records("sink") if record["message"] == "delivery"]
    assert (delivery["request_id"], delivery["outcome"]) == (NAME, "stored")
    everything = "".join(map(processes.log, processes.ports))
    for secret in (SECRET, "a-secret-key", data_url(image_file(7, (900, 700)))[30:60]):
        assert secret not in everything

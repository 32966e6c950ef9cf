"""A real Prometheus looks at a real run: every expression of board and rules is evaluated, and finds what there is to find."""

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.deploy.processes import Processes, prometheus, running, until
from tests.deploy.promql import queries, rules, tool
from tests.server.fakes.requests import chat, image_file, image_part

WITHOUT_DATA = {"Deliveries to the sinks: {{code}}"}
"""What a good run does not show: refusals of the sink."""

ROUNDS = 4


@pytest.fixture(scope="module")
async def observed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Processes, str]]:
    """Processes that were asked all kinds of things while Prometheus looked."""
    program, folder = tool("prometheus"), tmp_path_factory.mktemp("run")
    async with running(folder) as processes, prometheus(program, processes) as url:
        for number in range(ROUNDS):
            await scraped(processes, url)
            await ask(processes, number)
        await scraped(processes, url)
        yield processes, url


async def ask(processes: Processes, number: int) -> None:
    """A text, an image twice at once and then again, and images that are none to the gateway or to the vision worker."""
    image, broken = image_part(image_file(number, (900, 700))), image_part(image_file(number)[:-30])
    await asyncio.gather(*(post(processes, chat(part, stream=True)) for part in ("hello", image, image)))
    for part in (image, image_part(b"text"), broken):
        await post(processes, chat(part, stream=True))


async def post(processes: Processes, body: Any) -> int:
    async with processes.session.post(f"{processes.url}/v1/chat/completions", json=body) as answer:
        await answer.read()
        return answer.status


async def scraped(processes: Processes, url: str) -> None:
    """Return when Prometheus has looked at everybody twice since now."""
    since = (await instant(processes, url, "time()"))[0]

    async def fresh() -> bool:
        times = await instant(processes, url, "min by (job) (timestamp(up)) and min by (job) (up) == 1")
        return len(times) == len(processes.ports) + 1 and min(times) > since + 2

    await until(fresh, lambda: processes.log("prometheus"))


async def instant(processes: Processes, url: str, expression: str) -> list[float]:
    """The values of an expression now."""
    status, body = await processes.get(f"{url}/api/v1/query", query=expression)
    said = json.loads(body)
    assert (status, said["status"]) == (200, "success"), f"{expression}: {said}"
    result = said["data"]["result"]
    return [float(result[1])] if said["data"]["resultType"] == "scalar" else [float(sample["value"][1]) for sample in result]


@pytest.mark.parametrize("where", queries())
async def test_a_panel_shows_what_there_is(observed: tuple[Processes, str], where: str) -> None:
    values = await instant(*observed, queries()[where])
    assert all(map(math.isfinite, values)), values
    assert bool(values) == (where not in WITHOUT_DATA)


async def test_every_rule_is_evaluated_and_none_fires(observed: tuple[Processes, str]) -> None:
    processes, url = observed

    async def evaluated() -> list[dict[str, Any]]:
        _, body = await processes.get(f"{url}/api/v1/rules")
        found = [rule for group in json.loads(body)["data"]["groups"] for rule in group["rules"]]
        return found if all(rule["health"] != "unknown" for rule in found) else []

    found = await until(evaluated, lambda: processes.log("prometheus"))
    assert {rule["name"]: (rule["health"], rule.get("lastError")) for rule in found} == {
        rule["alert"]: ("ok", None) for rule in rules()
    }
    assert [rule["name"] for rule in found if rule["state"] == "firing"] == []


async def test_numbers_are_those_of_the_run(observed: tuple[Processes, str]) -> None:
    expected = {
        'dvd_requests_total{route="/v1/chat/completions",code="200"}': 4 * ROUNDS,
        'dvd_errors_total{code="invalid_image"}': 2 * ROUNDS,
        "dvd_vision_errors_total": ROUNDS,
        'dvd_vision_images_total{outcome="encoded"}': ROUNDS,
        'dvd_cache_events_total{tier="sink",event="hits"} + on () dvd_encodes_joined_total': 2 * ROUNDS,
        "dvd_sink_embeddings": ROUNDS,
        'dvd_sink_deliveries_total{outcome="stored"}': ROUNDS,
        "dvd_inter_token_seconds_count": 2 * 4 * ROUNDS,
        "sum(dvd_engine_requests_waiting)": 8,
        "sum(vllm:num_requests_waiting)": 8,
        "sum(dvd_worker_up)": 2,
    }
    found = {expression: await instant(*observed, expression) for expression in expected}
    assert found == {expression: [value] for expression, value in expected.items()}

"""A real Prometheus scrapes real processes, and every expression of the dashboard and the rules is evaluated on the result."""

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.deploy.processes import Processes, run_processes, run_prometheus, wait_until
from tests.deploy.promql import find_tool, queries, rules
from tests.server.fakes.requests import chat, image_file, image_part

WITHOUT_DATA = {
    "Deliveries to the sinks: {{code}}", "Refused requests: {{resource}}", "Retries and hedges: retries: {{outcome}}",
    "Requests over a budget: {{budget}}", "Connections: failed TLS handshakes: {{reason}}",
}  # fmt: skip
"""Panels that are empty while nothing fails and nothing is refused."""

ROUNDS = 4


@pytest.fixture(scope="module")
async def observed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Processes, str]]:
    """Processes that received requests of every kind while a Prometheus scraped them, and its URL."""
    program, folder = find_tool("prometheus"), tmp_path_factory.mktemp("run")
    async with run_processes(folder) as processes, run_prometheus(program, processes) as url:
        for number in range(ROUNDS):
            await wait_for_scrapes(processes, url)
            await send_requests(processes, number)
        await wait_for_scrapes(processes, url)
        yield processes, url


async def send_requests(processes: Processes, number: int) -> None:
    """Send a text, an image twice at once and then again, and images that gateway or vision worker reject."""
    image, truncated = image_part(image_file(number, (900, 700))), image_part(image_file(number)[:-30])
    await asyncio.gather(*(post(processes, chat(part, stream=True)) for part in ("hello", image, image)))
    for part in (image, image_part(b"text"), truncated):
        await post(processes, chat(part, stream=True))


async def post(processes: Processes, body: Any) -> int:
    async with processes.session.post(f"{processes.url}/v1/chat/completions", json=body) as response:
        await response.read()
        return response.status


async def wait_for_scrapes(processes: Processes, url: str) -> None:
    """Wait until Prometheus has scraped every process twice from now on."""
    since = (await evaluate(processes, url, "time()"))[0]

    async def is_fresh() -> bool:
        times = await evaluate(processes, url, "min by (job) (timestamp(up)) and min by (job) (up) == 1")
        return len(times) == len(processes.ports) + 1 and min(times) > since + 2

    await wait_until(is_fresh, lambda: processes.log("prometheus"))


async def evaluate(processes: Processes, url: str, expression: str) -> list[float]:
    """Return the current values of an expression."""
    status, body = await processes.get(f"{url}/api/v1/query", query=expression)
    reply = json.loads(body)
    assert (status, reply["status"]) == (200, "success"), f"{expression}: {reply}"
    result = reply["data"]["result"]
    return [float(result[1])] if reply["data"]["resultType"] == "scalar" else [float(sample["value"][1]) for sample in result]


@pytest.mark.parametrize("where", queries())
async def test_every_panel_has_data(observed: tuple[Processes, str], where: str) -> None:
    values = await evaluate(*observed, queries()[where])
    assert all(map(math.isfinite, values)), values
    assert bool(values) == (where not in WITHOUT_DATA)


async def test_every_rule_is_evaluated_and_none_fires(observed: tuple[Processes, str]) -> None:
    processes, url = observed

    async def evaluated_rules() -> list[dict[str, Any]]:
        _, body = await processes.get(f"{url}/api/v1/rules")
        loaded = [rule for group in json.loads(body)["data"]["groups"] for rule in group["rules"]]
        return loaded if all(rule["health"] != "unknown" for rule in loaded) else []

    loaded = await wait_until(evaluated_rules, lambda: processes.log("prometheus"))
    assert {rule["name"]: (rule["health"], rule.get("lastError")) for rule in loaded} == {
        rule["alert"]: ("ok", None) for rule in rules()
    }
    assert [rule["name"] for rule in loaded if rule["state"] == "firing"] == []


async def test_metrics_have_the_values_of_the_run(observed: tuple[Processes, str]) -> None:
    expected = {
        'dvd_requests_total{route="/v1/chat/completions",code="200"}': 4 * ROUNDS,
        'dvd_errors_total{code="invalid_image"}': 2 * ROUNDS,
        "dvd_vision_errors_total": ROUNDS,
        'dvd_vision_images_total{outcome="encoded"}': ROUNDS,
        'dvd_cache_events_total{tier="sink",event="hits"} + on () dvd_encodes_joined_total': 2 * ROUNDS,
        "dvd_sink_embeddings": ROUNDS,
        'dvd_sink_deliveries_total{outcome="stored"}': ROUNDS,
        "dvd_inter_token_seconds_count": 2 * 4 * ROUNDS,
        "sum(dvd_engine_requests_waiting)": 0,
        "sum(vllm:num_requests_waiting)": 0,
        "sum(dvd_worker_up)": 2,
    }
    actual = {expression: await evaluate(*observed, expression) for expression in expected}
    assert actual == {expression: [value] for expression, value in expected.items()}

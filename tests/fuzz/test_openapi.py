"""Requests derived from the gateway's own OpenAPI document: no failure of the server, and responses as declared."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import schemathesis
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import response_schema_conformance

from server.apis.registry import APIS
from tests.fuzz.strategies import near
from tests.server.fakes.stack import Stack, start_stack

UNAVAILABLE = (503, 504)
"""Statuses of a server that has no fault but cannot answer now."""


@pytest.fixture(scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    limits: dict[str, Any] = {"max_body_bytes": 1 << 20, "max_images": 4, "fetch_timeout": 2.0, "request_timeout": 20.0}
    async with start_stack(tmp_path_factory.mktemp("openapi"), **limits) as running:
        yield running


def call_operations(url: str) -> dict[str, set[int]]:
    """Call every operation with generated requests. Returns the statuses by operation."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    statuses: dict[str, set[int]] = {}
    operations: list[Any] = list(schema.get_all_operations())
    cases = st.one_of([result.ok().as_strategy() for result in operations])

    @settings(max_examples=150, phases=[Phase.explicit, Phase.generate])
    @given(cases)
    def call(case: "schemathesis.Case[Any]") -> None:
        response = case.call(base_url=url, timeout=30)
        statuses.setdefault(case.operation.label, set()).add(response.status_code)
        assert response.status_code < 500 or response.status_code in UNAVAILABLE, (response.status_code, response.content)
        if "application/json" in str(response.headers.get("content-type")):
            case.validate_response(response, checks=[response_schema_conformance])

    call()
    return statuses


async def test_no_generated_request_fails_the_gateway(stack: Stack) -> None:
    statuses = await asyncio.to_thread(call_operations, stack.url)
    assert {f"POST {api.path}" for api in APIS} <= set(statuses)
    assert (await stack.chat("a")).status == 200
    await stack.wait_until_idle()


@settings(max_examples=60)
@given(st.sampled_from(APIS).flatmap(lambda api: st.tuples(st.just(api.path), near(api.example))))
async def test_no_request_near_to_an_example_fails_the_gateway(stack: Stack, request_body: tuple[str, Any]) -> None:
    path, body = request_body
    response = await stack.post(body, path=path)
    assert response.status < 500 or response.status in UNAVAILABLE, response.body
    if response.status >= 400:
        assert response.json["error"]["message"]

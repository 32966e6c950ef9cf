"""What one caller can learn or take of another: nothing, by caches, salts or addresses."""

from pathlib import Path
from typing import Any

import pytest

from tests.server.fakes.requests import image_part
from tests.server.fakes.stack import Stack, start_stack
from tests.server.gateway.helpers import A

ME, YOU = {"Authorization": "Bearer me"}, {"Authorization": "Bearer you"}
TEXT_PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/completions": {"prompt": "a"},
    "/v1/responses": {"input": "a"},
    "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
}


async def salt(stack: Stack, headers: dict[str, str], path: str = "/v1/chat/completions", **fields: object) -> str:
    """Send a text request and return the salt that vLLM got."""
    response = await stack.post({**TEXT_PATHS[path], **fields}, headers, path)
    assert response.status == 200, response.body
    value = stack.engine.requests[-1].cache_salt
    assert isinstance(value, str)
    return value


async def test_each_caller_has_a_prefix_cache_of_its_own(stack: Stack) -> None:
    for path in TEXT_PATHS:
        mine, yours = await salt(stack, ME, path), await salt(stack, YOU, path)
        assert mine == await salt(stack, ME), "one caller's prefixes are reused whatever the API"
        assert len({mine, yours, await salt(stack, {}, path)}) == 3
        assert len(mine) == 64


async def test_a_callers_own_salt_divides_its_cache_and_reaches_no_other(stack: Stack) -> None:
    mine, yours = await salt(stack, ME), await salt(stack, YOU)
    own = await salt(stack, ME, cache_salt="mine")
    assert own == await salt(stack, ME, cache_salt="mine")
    assert await salt(stack, ME, cache_salt=yours) not in (mine, yours, own)
    assert len({mine, yours, own, await salt(stack, YOU, cache_salt="mine")}) == 4


async def test_an_invalid_salt_is_left_to_vllm(stack: Stack) -> None:
    for invalid in ("", "x" * 1025, 5, ["a"]):
        await stack.post({**TEXT_PATHS["/v1/completions"], "cache_salt": invalid}, path="/v1/completions")
        assert stack.engine.requests[-1].cache_salt == invalid


async def test_requests_that_generate_nothing_have_no_salt(stack: Stack) -> None:
    await stack.post({"prompt": "a"}, path="/tokenize")
    assert stack.engine.requests[-1].cache_salt is None


async def test_the_spelling_of_the_key_does_not_change_the_caller(tmp_path: Path) -> None:
    async with start_stack(tmp_path, api_key="hunter2") as stack:
        spellings = ({"Authorization": "Bearer hunter2"}, {"Authorization": "bearer  hunter2"}, {"x-api-key": "hunter2"})
        assert len({await salt(stack, headers) for headers in spellings}) == 1


async def test_nobody_learns_that_another_caller_has_sent_an_image(stack: Stack) -> None:
    reports = [(await stack.chat(image_part(A), headers=headers)).headers["X-DvD-Images"] for headers in (ME, YOU)]
    assert reports[0] == reports[1]
    assert reports[0].endswith("reused=0; shared=0; encoded=1")
    first, second = stack.vision.calls
    assert first.scope != second.scope
    assert not {image.key for image in first.images} & {image.key for image in second.images}
    assert (await stack.chat(image_part(A), headers=ME)).headers["X-DvD-Images"].endswith("reused=1; shared=0; encoded=0")


FORWARDED = {"X-Forwarded-For": "203.0.113.7", "Forwarded": "for=203.0.113.7", "X-Real-IP": "203.0.113.7"}


async def test_a_caller_cannot_choose_its_address(stack: Stack) -> None:
    await stack.chat(image_part(A), headers=FORWARDED)
    assert stack.vision.calls[-1].caller == "127.0.0.1"


@pytest.mark.parametrize("name", ["Authorization", "x-api-key"])
async def test_a_caller_cannot_have_more_turns_by_sending_more_keys(stack: Stack, name: str) -> None:
    for key in ("Bearer a", "Bearer b", "c"):
        await stack.chat(image_part(A), headers={name: key})
        assert stack.vision.calls[-1].caller == "127.0.0.1"


async def test_with_an_api_key_its_owner_is_the_caller(tmp_path: Path) -> None:
    proxies: dict[str, Any] = {"trusted_proxies": ["127.0.0.1"], "api_key": "hunter2"}
    async with start_stack(tmp_path, **proxies) as stack:
        for address in ("203.0.113.1", "203.0.113.2"):
            await stack.chat(image_part(A), headers={"x-api-key": "hunter2", "X-Forwarded-For": address, "X": address})
        assert len({call.caller for call in stack.vision.calls}) == 1
        assert "203" not in stack.vision.calls[-1].caller


@pytest.mark.parametrize(
    ("address", "caller"),
    [
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("::ffff:203.0.113.7", "::ffff:203.0.113.7"),
        ("nonsense", "nonsense"),
    ],
)
async def test_a_network_of_ipv6_is_one_caller(tmp_path: Path, address: str, caller: str) -> None:
    async with start_stack(tmp_path, trusted_proxies=["127.0.0.1"]) as stack:
        await stack.chat(image_part(A), headers={"X-Forwarded-For": address})
        assert stack.vision.calls[-1].caller == caller


async def test_a_trusted_proxy_names_the_callers_address(tmp_path: Path) -> None:
    async with start_stack(tmp_path, trusted_proxies=["127.0.0.0/8"]) as stack:
        await stack.chat(image_part(A), headers={"X-Forwarded-For": "198.51.100.1, 203.0.113.7"})
        assert stack.vision.calls[-1].caller == "203.0.113.7", "what the caller itself has written is ignored"
    (tmp_path / "other").mkdir()
    async with start_stack(tmp_path / "other", trusted_proxies=["10.0.0.1"]) as stack:
        await stack.chat(image_part(A), headers=FORWARDED)
        assert stack.vision.calls[-1].caller == "127.0.0.1"

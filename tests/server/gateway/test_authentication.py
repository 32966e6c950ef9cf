"""API keys, and that clients with different keys share no embedding."""

from pathlib import Path

from tests.server.fakes.requests import chat, image_part
from tests.server.fakes.stack import Stack, start_stack
from tests.server.gateway.helpers import A


async def test_a_configured_api_key_is_required(tmp_path: Path) -> None:
    async with start_stack(tmp_path, api_key="sesame-1") as stack:
        wrong = ["", "sesame-1", "Bearer", "Bearer ", "Bearer sesame-2", "Bearer sesame-", "Bearer sesame-11", "Basic sesame-1"]
        wrong += ["Bearer SESAME-1", "Bearer sesame-1, sesame-1", "Bearer s\xe9same-1", "Bearer sesame-1 x"]
        for credentials in wrong:
            for method, path in (("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/v1/models")):
                response = await stack.request(method, path, data=b"{", headers={"Authorization": credentials})
                assert (response.status, response.error["code"]) == (401, "invalid_api_key")
                assert response.error["type"] == "authentication_error"
                assert "sesame-1" not in response.error["message"]
        assert (await stack.post(chat("a"))).status == 401
        for credentials in ("Bearer sesame-1", "bearer sesame-1", "BEARER  sesame-1 "):
            assert (await stack.chat("a", headers={"Authorization": credentials})).status == 200
        assert "Authorization" not in stack.engine.requests[-1].headers
        for path in ("/health/live", "/health/ready", "/version", "/metrics"):
            assert (await stack.get(path)).status == 200


async def test_clients_with_different_keys_share_no_embedding(stack: Stack) -> None:
    for credentials in ("Bearer a", "Bearer b", "Bearer a", None):
        headers = {"Authorization": credentials} if credentials else {}
        assert (await stack.chat(image_part(A), headers=headers)).status == 200
    keys = [request.json["messages"][0]["content"][0]["uuid"] for request in stack.engine.requests]
    assert keys[0] == keys[2]
    assert len(set(keys)) == len(stack.vision.calls) == 3


async def test_a_client_is_identified_by_either_key_header(stack: Stack) -> None:
    for headers in ({"Authorization": "Bearer me"}, {"x-api-key": "me"}, {"x-api-key": "you"}):
        await stack.chat(image_part(A), headers=headers)
    assert len(stack.vision.calls) == 2

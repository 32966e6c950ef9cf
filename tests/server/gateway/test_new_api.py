"""Adding an API is one file and one line of the registry: a toy API, declared here, is served like the others."""

from pathlib import Path
from typing import Any

from common.embedding_ref import EmbeddingRef
from server.apis.base import Api
from server.apis.image_options import ImageOptions, RequestPolicy
from server.apis.registry import APIS
from server.apis.request import ImagePart
from server.http.error_format import ErrorFormat
from tests.server.fakes.requests import data_url, image_file
from tests.server.fakes.stack import start_stack
from tests.server.fakes.vision_worker import visual_token_count
from tests.server.fakes.vllm import COMPLETION, MODEL

IMAGE = image_file(1)


def find_images(body: dict[str, Any], policy: RequestPolicy) -> list[ImagePart]:
    """Find the pictures of a caption request."""
    options = ImageOptions("pictures", "auto", None, policy.router)
    return [ImagePart(("pictures", i), url, options) for i, url in enumerate(body["pictures"])]


CAPTIONS = Api(
    path="/v1/captions",
    summary="Caption pictures",
    example={"model": MODEL, "pictures": ["https://example.org/photo.jpg"]},
    find_images=find_images,
    placeholder=lambda key, tokens: {"embedding": EmbeddingRef(key, tokens).url},
    error_format=ErrorFormat(lambda body: {"problem": body["error"]["code"]}, lambda _body: b"data: problem"),
)


async def test_an_api_of_one_declaration_is_served(tmp_path: Path) -> None:
    async with start_stack(tmp_path, apis=(*APIS, CAPTIONS)) as stack:
        response = await stack.post({"model": MODEL, "pictures": [data_url(IMAGE)]}, path="/v1/captions")
        assert (response.status, response.body) == (200, COMPLETION)
        request = stack.engine.requests[-1]
        assert request.path == "/v1/captions"
        (key,) = stack.sink.rows
        assert request.json["pictures"] == [{"embedding": EmbeddingRef(key, visual_token_count(IMAGE)).url}]
        failed = await stack.post({"model": "unknown", "pictures": []}, path="/v1/captions")
        assert (failed.status, failed.json) == (404, {"problem": "model_not_found"})
        await stack.wait_until_idle()


async def test_every_api_is_in_the_openapi_document_with_an_example(tmp_path: Path) -> None:
    async with start_stack(tmp_path, apis=(*APIS, CAPTIONS)) as stack:
        document = (await stack.get("/openapi.json")).json
        for api in (*APIS, CAPTIONS):
            operation = document["paths"][api.path]["post"]
            assert operation["summary"] == api.summary
            assert operation["requestBody"]["content"]["application/json"]["example"] == api.example
        assert {"/v1/models", "/health/ready", "/metrics"} <= set(document["paths"])
        assert (await stack.get("/docs")).status == 404, "the interactive page is off by default"


async def test_the_interactive_page_is_served_if_the_operator_wants_it(tmp_path: Path) -> None:
    async with start_stack(tmp_path, docs=True) as stack:
        response = await stack.get("/docs")
        assert response.status == 200
        assert b"swagger" in response.body

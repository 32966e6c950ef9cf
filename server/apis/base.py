"""What an API of the gateway declares. Adding an API is one file in this folder and one line in `registry.py`."""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from server.apis.budgets import check_budgets, count_sequences
from server.apis.constraint_budgets import check_constraints
from server.apis.engine_limits import check_integers
from server.apis.image_options import RequestPolicy
from server.apis.request import ImagePart, ParsedRequest, Placeholder, check_fields, embedding_part, without_nulls
from server.http import json_body
from server.http.error_format import OPENAI, ErrorFormat
from server.pipeline import Pipeline
from server.request_context import RequestContext

FindImages = Callable[[dict[str, Any], RequestPolicy], list[ImagePart]]
"""Finds the images of a body, in their order. Raises `InvalidRequest` or `TooManyImages`, with the location."""

Prepare = Callable[[dict[str, Any]], dict[str, Any]]
"""Returns a body as vLLM takes it, the same object if nothing needs to change. Raises `InvalidRequest`, with the location."""

Respond = Callable[[Pipeline, ParsedRequest, RequestContext], Coroutine[Any, Any, Response]]
"""Answers a parsed request."""


def no_images(_body: dict[str, Any], _policy: RequestPolicy) -> list[ImagePart]:
    """Return no images: the API takes text only."""
    return []


def unchanged(body: dict[str, Any]) -> dict[str, Any]:
    """Return the body: vLLM takes it as it is."""
    return body


@dataclass(frozen=True)
class Api:
    """One endpoint of the gateway, `POST path`.

    Attributes:
        path: Path of the endpoint; unless `respond` is set, also the path on vLLM's server.
        summary: One line for the OpenAPI document.
        example: A request body for the OpenAPI document.
        prepare: Checks and converts what vLLM would fail on, before images are looked for.
        find_images: Finds the images of a body.
        placeholder: Makes the content part that replaces an image in vLLM's body.
        error_format: The format in which the API reports errors.
        generates_text: Whether the response is generated text; its duration is then exported as `dvd_request_seconds`.
        max_tokens_fields: Names of the field that bounds the generated text, of which the first one that is set counts.
        default_max_tokens: Length of the generated text if none of them is set; None: the rest of the model's context.
        respond: Answers a request; by default `Pipeline.answer`, which forwards it to vLLM.
    """

    path: str
    summary: str
    example: dict[str, Any] = field(repr=False)
    prepare: Prepare = unchanged
    find_images: FindImages = no_images
    placeholder: Placeholder = embedding_part
    error_format: ErrorFormat = OPENAI
    generates_text: bool = False
    max_tokens_fields: tuple[str, ...] = ()
    default_max_tokens: int | None = None
    respond: Respond = Pipeline.answer

    def parse(self, raw: bytes, policy: RequestPolicy) -> ParsedRequest:
        """Parse a request body. Raises `InvalidRequest`, `BudgetExceeded` or `TooManyImages`, with the location."""
        received = json_body.decode_object(raw)
        body = without_nulls(received)
        check_fields(body)
        check_integers(body)
        check_budgets(body)
        check_constraints(body, compiled_tools=policy.compiled_tools)
        sequences = count_sequences(body, policy.max_sequences) if self.generates_text else 1
        prepared = self.prepare(body)
        images = self.find_images(prepared, policy)
        if prepared is not received and not images:  # with images the body is encoded when they have been replaced
            raw = json_body.encode(prepared)
        return ParsedRequest(raw, prepared, images, self.placeholder, sequences)

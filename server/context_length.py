"""Requests that cannot fit the model's context, by arithmetic: they are rejected before any image is encoded.

vLLM tokenizes a prompt before it looks at its length, and all prompts in one thread.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from common import errors
from protos import vision_pb2 as pb
from server.apis.budgets import over_budget
from server.apis.request import ImagePart, ParsedRequest
from server.request_context import RequestContext

CHARACTERS_PER_TOKEN = 16
"""Characters of a prompt for each token of the context. Text has 2 to 6 a token, code with much white space about 10."""
UNKNOWN_CONTEXT_CHARACTERS = 4 << 20
"""Maximum number of characters where vLLM does not report its context."""
MAX_LONG_PROMPTS = 8
"""Several prompts of a request may have as many characters together as so many single ones."""
_ID_FIELDS = ("prompt", "tokens", "prompt_token_ids")


def check_max_tokens(body: Mapping[str, Any], fields: Sequence[str], limit: int) -> None:
    """Check the maximum length of the response.

    Args:
        body: The request.
        fields: Names of the field with the maximum; the first one that is set counts.
        limit: Maximum number of tokens of a prompt and its response.

    Raises:
        ContextLengthExceeded: The maximum exceeds the limit.
        InvalidRequest: It is negative.
    """
    name = max_tokens_field(body, fields)
    if name is None or type(body[name]) is not int:
        return
    if body[name] < 0:  # vLLM would name the field that it calls the same; 0 it takes in completions with echo
        raise errors.InvalidRequest(f"{name} is {body[name]}: expected a whole number from 1 to {limit}.", param=name)
    if body[name] > limit:
        raise errors.ContextLengthExceeded(
            f"{name} {body[name]} exceeds the model's context of {limit} tokens, which holds the prompt too: "
            "send a smaller number.",
            param=name,
        )


def max_tokens_field(body: Mapping[str, Any], fields: Sequence[str]) -> str | None:
    """Return which of the fields with the maximum length counts: the first one that is set. None if none is."""
    return next((name for name in fields if body.get(name) is not None), None)


def check_output_tokens(request: ParsedRequest, context: RequestContext, limit: int | None, most: int) -> None:
    """Check the maximum number of tokens of all sequences of a request. One sequence alone is bounded by the model's context.

    Args:
        request: The request.
        context: Names the fields with the maximum of a sequence.
        limit: Maximum number of tokens of a prompt and its response; None if it is not known.
        most: Maximum number of tokens of all sequences together.

    Raises:
        BudgetExceeded: Together they may become longer.
    """
    if request.sequences == 1 or not context.max_tokens_fields:
        return
    name = max_tokens_field(request.body, context.max_tokens_fields)
    tokens = request.body[name] if name else context.default_max_tokens
    if type(tokens) is not int or tokens < 1:  # to the end of the context, or vLLM reads it as a number, or rejects it
        tokens = limit or 0
    tokens = min(tokens, limit or tokens)
    total = request.sequences * tokens
    if total > most:
        field = name or context.max_tokens_fields[0]
        raise errors.BudgetExceeded.of(
            "output_tokens",
            f"{field} allows {total} tokens ({request.sequences} sequences × {tokens}); the maximum is {most} "
            f"(--max-output-tokens): set {field} to {most // request.sequences} or less, or send several requests.",
            field,
        )


def check_texts(request: ParsedRequest, limit: int | None, max_characters: int | None) -> None:
    """Check the texts and the token ids of a request.

    Args:
        request: The request. The URLs of its images do not count.
        limit: Maximum number of tokens of a prompt and its response; None if it is not known.
        max_characters: The operator's bound; None for the default one.

    Raises:
        BudgetExceeded: The texts have more characters than the operator allows.
        ContextLengthExceeded: They have more than any prompt that fits the context, or a list of token ids is longer than it.
    """
    default = CHARACTERS_PER_TOKEN * limit if limit else UNKNOWN_CONTEXT_CHARACTERS
    most = max_characters or default
    if len(request.raw) > most:  # else no text can be too long: a character takes a byte or more
        images = sum(len(image.url) for image in request.images)
        sizes = {name: count_characters(value) for name, value in request.body.items()}
        most *= min(_prompt_count(request.body), MAX_LONG_PROMPTS)
        if (characters := sum(sizes.values()) - images) > most:
            image_field = request.images[0].path[0] if request.images else None
            field = max(sizes, key=lambda name: sizes[name] - images * (name == image_field))
            raise _too_many_characters(field, characters, most, None if max_characters else limit)
    if limit is not None:
        _check_ids(request.body, limit)


def _too_many_characters(field: str, characters: int, most: int, context: int | None) -> errors.InvalidRequest:
    """Return the error of a text: by the context it has the code for which clients shorten a chat."""
    error = over_budget(
        "prompt_characters", field, characters, most, "characters", "send a shorter text (--max-prompt-characters)"
    )
    if context is None:
        return error
    text = f"{field} has {characters} characters; the context of {context} tokens holds at most {most}: send a shorter text."
    return errors.ContextLengthExceeded(text, param=field)


def count_characters(value: Any) -> int:
    """Return the number of characters of all texts in a value, keys of objects included."""
    count, pending = 0, [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            count += len(item)
        elif isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            pending += item
    return count


def _check_ids(body: Mapping[str, Any], limit: int) -> None:
    for name in _ID_FIELDS:
        value = body.get(name)
        for ids in (value, *(value if isinstance(value, list) else ())):
            if isinstance(ids, list) and len(ids) > limit and type(ids[0]) is int:
                raise errors.ContextLengthExceeded(
                    f"{name} has {len(ids)} token ids, but the model's context is {limit} tokens: send fewer.", param=name
                )


def _prompt_count(body: Mapping[str, Any]) -> int:
    prompt = body.get("prompt")
    return len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], str) else 1


def check_images(request: ParsedRequest, tokens: int, limit: int, has_router: bool) -> None:
    """Check the visual tokens of a prompt.

    Args:
        request: The request, with one `ImagePart` for each image file.
        tokens: Visual tokens that its images need at least.
        limit: Maximum number of tokens of a prompt and its response.
        has_router: Whether the model can compress tiles.

    Raises:
        ContextLengthExceeded: The images alone exceed the limit.
    """
    if tokens <= limit:
        return
    images = request.images
    count = f"{len(images)} image" + "s" * (len(images) > 1)
    raise errors.ContextLengthExceeded(
        f"The request has {count} of at least {tokens} visual tokens, but the model's context is {limit} tokens: "
        f"{', or '.join(_hints(images, has_router))}.",
        param=str(images[0].path[0]),
    )


def _hints(images: Sequence[ImagePart], has_router: bool) -> list[str]:
    hints = ["send fewer images"] if len(images) > 1 else []
    if any(image.options.detail != "low" for image in images):
        hints.append("set a smaller max_dynamic_patch")
    if has_router and any(image.options.router.mode == pb.Router.OFF for image in images):
        hints.append('set vir to {"mode": "auto"}')
    return hints or ["the model cannot take an image"]

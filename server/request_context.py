"""The context of a request: what the pipeline needs besides the body."""

from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

from server.http.error_format import ErrorFormat
from server.request_stats import RequestStats


def unbounded(_size: int) -> None:
    """Reserve memory that has no bound."""


@dataclass(frozen=True)
class RequestContext:
    """The context of one request.

    Attributes:
        caller: Digest of the caller's credentials; part of every embedding key.
        flow: Who shares capacity fairly with others: the caller's API key, or its address if the gateway demands none.
        path: Path of the request, which is also the path on vLLM's server.
        error_format: How the caller's API reports errors.
        stats: Statistics of the request.
        deadline: Monotonic time at which the request expires.
        resources: Permit, workers in use and connections, which the request holds until the last byte of its response.
        max_tokens_fields: Names of the field with the maximum number of tokens of the response, of which the first one that is
            set counts; empty if the API generates no text.
        default_max_tokens: That number if none of them is set; None: the rest of the model's context.
        reserve_bytes: Reserves memory for what is fetched, beside that of the body. Raises `Overloaded` if it is not left.
        cache_salt: Makes the salt of vLLM's prefix cache from the caller's own salt; None if the API generates no text.
    """

    caller: bytes
    flow: str
    path: str
    error_format: ErrorFormat
    stats: RequestStats
    deadline: float
    resources: AsyncExitStack
    reserve_bytes: Callable[[int], None] = unbounded
    max_tokens_fields: tuple[str, ...] = ()
    default_max_tokens: int | None = None
    cache_salt: Callable[[str], str] | None = None

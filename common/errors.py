"""Every error of this system, with its gRPC code, HTTP status and OpenAI `type` and `code`.

DvdError
├── InvalidRequest            the caller's fault
│   ├── InvalidImage          bytes that are not an image we decode
│   ├── ImageTooLarge         bytes or pixels over the limit
│   ├── InvalidVideo          bytes that are not a video we decode
│   ├── TooManyImages
│   ├── BodyTooLarge
│   ├── HeadTooLarge          the request's line and headers
│   ├── ImageFetchFailed      the URL cannot be had, or may not be fetched
│   └── ContextLengthExceeded
├── Unauthorized
├── ModelNotFound
├── Overloaded                no permit left; try again later
├── DeadlineExceeded          the request's time is up
├── Unavailable               no worker can serve the request now
│   ├── WorkerUnavailable     the worker that was called does not answer; another one may
│   ├── EmbeddingLost         an embedding was evicted before vLLM read it
│   ├── CheckpointMismatch    two workers serve different checkpoints
│   ├── SinkUnavailable       a vision worker found no sink to deliver to
│   └── SinkFull              no room for an embedding that would not be evicted again
└── InternalError             ours
"""

import asyncio
from http import HTTPStatus
from typing import Any, ClassVar

import grpc

Grpc = grpc.StatusCode


class DvdError(Exception):
    """Base of all errors that may leave a process. `str(error)` is for the caller: it names the value and offers a hint."""

    status: ClassVar[HTTPStatus] = HTTPStatus.INTERNAL_SERVER_ERROR
    grpc_code: ClassVar[grpc.StatusCode] = Grpc.INTERNAL
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The error object of OpenAI's API."""
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequest(DvdError):
    status = HTTPStatus.BAD_REQUEST
    grpc_code = Grpc.INVALID_ARGUMENT
    type = "invalid_request_error"
    code = "invalid_request"


class InvalidImage(InvalidRequest):
    code = "invalid_image"


class ImageTooLarge(InvalidRequest):
    code = "image_too_large"


class InvalidVideo(InvalidRequest):
    code = "invalid_video"


class TooManyImages(InvalidRequest):
    code = "too_many_images"


class BodyTooLarge(InvalidRequest):
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    code = "body_too_large"


class HeadTooLarge(InvalidRequest):
    status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    code = "head_too_large"


class ImageFetchFailed(InvalidRequest):
    code = "image_fetch_failed"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class Unauthorized(DvdError):
    status = HTTPStatus.UNAUTHORIZED
    grpc_code = Grpc.UNAUTHENTICATED
    type = "authentication_error"
    code = "invalid_api_key"


class ModelNotFound(DvdError):
    status = HTTPStatus.NOT_FOUND
    grpc_code = Grpc.NOT_FOUND
    type = "invalid_request_error"
    code = "model_not_found"


class Overloaded(DvdError):
    status = HTTPStatus.TOO_MANY_REQUESTS
    grpc_code = Grpc.RESOURCE_EXHAUSTED
    type = "rate_limit_error"
    code = "overloaded"


class DeadlineExceeded(DvdError):
    status = HTTPStatus.GATEWAY_TIMEOUT
    grpc_code = Grpc.DEADLINE_EXCEEDED
    code = "deadline_exceeded"


class Unavailable(DvdError):
    status = HTTPStatus.SERVICE_UNAVAILABLE
    grpc_code = Grpc.UNAVAILABLE
    code = "unavailable"


class WorkerUnavailable(Unavailable):
    """The worker that was called is gone or cannot compute. The caller marks it down and may ask another one."""


class EmbeddingLost(Unavailable):
    code = "embedding_lost"


class CheckpointMismatch(Unavailable):
    grpc_code = Grpc.FAILED_PRECONDITION
    code = "checkpoint_mismatch"


class SinkUnavailable(Unavailable):
    code = "sink_unavailable"


class SinkFull(Unavailable):
    code = "sink_full"


class InternalError(DvdError):
    pass


def all_errors(root: type[DvdError] = DvdError) -> list[type[DvdError]]:
    """Every class of the tree, the root first."""
    return [root] + [c for child in root.__subclasses__() for c in all_errors(child)]


def error_code(error: BaseException) -> str:
    """Of any exception that ended a call, for metrics and logs."""
    if isinstance(error, DvdError):
        return error.code
    return "cancelled" if isinstance(error, asyncio.CancelledError) else InternalError.code


def error_class(code: str) -> type[DvdError] | None:
    """The class with this `code`, or None: a newer peer may know more."""
    # a worker that answers "unavailable" speaks of itself: of two classes with one code the leaf is meant
    return next((cls for cls in reversed(all_errors()) if cls.code == code), None)

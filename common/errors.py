"""Every error that may leave a process, with its gRPC code, HTTP status and OpenAI `type` and `code`.

DvdError
├── InvalidRequest            the request is wrong; a retry fails too
│   ├── InvalidImage          bytes that are not an image in a supported format
│   ├── ImageTooLarge         bytes or pixels above the limit
│   ├── InvalidVideo          bytes that are not a video in a supported format
│   ├── TooManyImages         images above the limit
│   ├── BodyTooLarge          body above the limit
│   ├── UnsupportedEncoding   body in an unknown Content-Encoding
│   ├── HeadTooLarge          request line and headers above the limit
│   ├── RequestTooSlow        head or body arrives too slowly
│   ├── BudgetExceeded        a field asks for more work than one request may cost
│   ├── ImageFetchFailed      the URL cannot be fetched, or is not allowed
│   └── ContextLengthExceeded prompt longer than the model's context
├── Unauthorized              no API key, or a wrong one
├── ModelNotFound             a model that is not served
├── Overloaded                at capacity; retry later
├── DeadlineExceeded          the request's deadline has passed
├── Unavailable               no worker can serve the request now
│   ├── WorkerUnavailable     the called worker does not answer; another one may
│   ├── EmbeddingLost         an embedding was evicted before vLLM read it
│   ├── CheckpointMismatch    two workers serve different checkpoints
│   ├── SinkUnavailable       a vision worker cannot reach the sink
│   ├── GrantRefused          a sink does not accept a delivery's grant
│   └── SinkFull              the sink has no room: all its embeddings are pinned or leased
└── InternalError             a bug
    └── EngineFailed          vLLM failed on the request; another language worker may serve it
"""

import asyncio
import enum
from http import HTTPStatus
from typing import Any, ClassVar, Self


class GrpcCode(enum.Enum):
    """The gRPC statuses of errors, by the names of `grpc.StatusCode`: what only decodes or computes needs no grpcio."""

    INVALID_ARGUMENT = enum.auto()
    UNAUTHENTICATED = enum.auto()
    PERMISSION_DENIED = enum.auto()
    NOT_FOUND = enum.auto()
    RESOURCE_EXHAUSTED = enum.auto()
    DEADLINE_EXCEEDED = enum.auto()
    UNAVAILABLE = enum.auto()
    FAILED_PRECONDITION = enum.auto()
    INTERNAL = enum.auto()


_Grpc = GrpcCode


class DvdError(Exception):
    """Base of all errors that may leave a process. The message is for the caller: it names the value and offers a hint.

    Attributes:
        status: HTTP status.
        grpc_code: name of the gRPC status.
        type: `type` in the error objects of OpenAI's API.
        code: `code` in them; it also identifies the class between processes.
        param: parameter of the request that is wrong, if it is one.
        retry_after: seconds after which the caller may retry, if known.
    """

    status: ClassVar[HTTPStatus] = HTTPStatus.INTERNAL_SERVER_ERROR
    grpc_code: ClassVar[GrpcCode] = _Grpc.INTERNAL
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after = retry_after

    def at(self, location: str) -> Self:
        """Return this error with the place in the request where it arose, unless it names a parameter already."""
        if self.param:
            return self
        return type(self)(f"{location}: {self}", param=location, retry_after=self.retry_after)

    def body(self) -> dict[str, Any]:
        """Return the body of an error response in OpenAI's API."""
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequest(DvdError):
    """The request is wrong: the same request fails again."""

    status = HTTPStatus.BAD_REQUEST
    grpc_code = _Grpc.INVALID_ARGUMENT
    type = "invalid_request_error"
    code = "invalid_request"


class InvalidImage(InvalidRequest):
    """The bytes are not an image in a supported format."""

    code = "invalid_image"


class ImageTooLarge(InvalidRequest):
    """An image has more bytes or pixels than allowed."""

    code = "image_too_large"


class InvalidVideo(InvalidRequest):
    """The bytes are not a video in a supported format."""

    code = "invalid_video"


class TooManyImages(InvalidRequest):
    """A request has more images than allowed."""

    code = "too_many_images"


class BodyTooLarge(InvalidRequest):
    """The body of a request has more bytes than allowed."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    code = "body_too_large"


class UnsupportedEncoding(InvalidRequest):
    """The body of a request is encoded in a way that is not supported."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    code = "unsupported_encoding"


class HeadTooLarge(InvalidRequest):
    """Request line and headers have more bytes than allowed."""

    status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    code = "head_too_large"


class RequestTooSlow(InvalidRequest):
    """The head or the body of a request arrives too slowly."""

    status = HTTPStatus.REQUEST_TIMEOUT
    code = "request_too_slow"


class BudgetExceeded(InvalidRequest):
    """A field of a request asks for more work than one request may cost.

    Attributes:
        budget: Name of the budget, for metrics.
    """

    code = "budget_exceeded"
    budget: str = "other"

    @classmethod
    def of(cls, budget: str, message: str, param: str) -> Self:
        """Return the error of a budget."""
        error = cls(message, param=param)
        error.budget = budget
        return error


class ImageFetchFailed(InvalidRequest):
    """The URL of an image or video cannot be fetched, or is not allowed."""

    code = "image_fetch_failed"


class ContextLengthExceeded(InvalidRequest):
    """The prompt is longer than the model's context."""

    code = "context_length_exceeded"


class Unauthorized(DvdError):
    """The request has no API key, or a wrong one; between processes, no or a wrong cluster token."""

    status = HTTPStatus.UNAUTHORIZED
    grpc_code = _Grpc.UNAUTHENTICATED
    type = "authentication_error"
    code = "invalid_api_key"


class ModelNotFound(DvdError):
    """The request names a model that is not served."""

    status = HTTPStatus.NOT_FOUND
    grpc_code = _Grpc.NOT_FOUND
    type = "invalid_request_error"
    code = "model_not_found"


class Overloaded(DvdError):
    """The process is at capacity: retry later."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    grpc_code = _Grpc.RESOURCE_EXHAUSTED
    type = "rate_limit_error"
    code = "overloaded"


class DeadlineExceeded(DvdError):
    """The request's deadline has passed."""

    status = HTTPStatus.GATEWAY_TIMEOUT
    grpc_code = _Grpc.DEADLINE_EXCEEDED
    code = "deadline_exceeded"


class Unavailable(DvdError):
    """No worker can serve the request now."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    grpc_code = _Grpc.UNAVAILABLE
    code = "unavailable"


class WorkerUnavailable(Unavailable):
    """The called worker is gone or cannot compute. The caller marks it down and may call another one."""


class EmbeddingLost(Unavailable):
    """An embedding was evicted before vLLM read it. The gateway encodes the image once more."""

    code = "embedding_lost"


class CheckpointMismatch(Unavailable):
    """Two workers serve different checkpoints."""

    grpc_code = _Grpc.FAILED_PRECONDITION
    code = "checkpoint_mismatch"


class SinkUnavailable(Unavailable):
    """A vision worker cannot reach the sink that it delivers to."""

    code = "sink_unavailable"


class GrantRefused(Unavailable):
    """A sink or a vision worker does not accept the grant of a delivery: processes of one cluster do not fit together."""

    grpc_code = _Grpc.PERMISSION_DENIED
    code = "grant_refused"


class SinkFull(Unavailable):
    """The sink has no room for an embedding: all of its embeddings are pinned or leased."""

    code = "sink_full"


class InternalError(DvdError):
    """A bug in this system."""


class EngineFailed(InternalError):
    """vLLM answered with an error that is not the caller's fault. Another language worker may serve the request."""

    code = "engine_error"


def all_errors(root: type[DvdError] = DvdError) -> list[type[DvdError]]:
    """Return every class of the tree, the root first."""
    return [root] + [c for child in root.__subclasses__() for c in all_errors(child)]


def error_code(error: BaseException) -> str:
    """Return the code of any exception that ended a call, for metrics and logs."""
    if isinstance(error, DvdError):
        return error.code
    return "cancelled" if isinstance(error, asyncio.CancelledError) else InternalError.code


def error_class(code: str) -> type[DvdError] | None:
    """Return the class with this `code`, or None: a newer peer may have more."""
    # two classes have the code "unavailable"; a worker that sends it reports itself: WorkerUnavailable, the subclass
    return next((cls for cls in reversed(all_errors()) if cls.code == code), None)

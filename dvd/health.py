"""`dvd health ADDRESS`: check whether the process at an address can do its work.

Every container image runs it, so it uses only gRPC and the standard library, which all of them have.
"""

import asyncio
import json
import logging
from collections.abc import Sequence
from urllib.parse import urlsplit

import grpc

from common import errors, logs, messages, rpc
from common.addresses import is_unreachable_loopback, vllm_address
from common.http_get import http_get
from common.options import ConfigError, logging_options, read_options
from common.secrets import redact_url
from common.security import OPEN, Credentials, read_credentials
from dvd.config import HealthOptions
from protos import embeddings_pb2 as pb
from protos import embeddings_pb2_grpc, vision_pb2_grpc

log = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> None:
    """Print one line about the process at ADDRESS. Exits 1 if it cannot do its work, 2 on an invalid option."""
    try:
        options = read_options(HealthOptions, arguments)
        credentials = read_credentials(options)
    except ConfigError as error:
        logs.exit_with_error("dvd health", str(error), logging_options(arguments).log_format, 2)
    shown = redact_url(options.address)
    try:
        description = asyncio.run(check(options.address, options.timeout, credentials))
    except errors.DvdError as error:
        logs.exit_with_error("dvd health", f"{shown}: {error}", options.log_format)
    logs.print_answer("dvd health", f"{shown}: {description}", options.log_format)


async def check(address: str, timeout: float, credentials: Credentials = OPEN) -> str:
    """Return a description of the healthy process at `address`.

    Args:
        address: a worker's gRPC address, or the URL of a gateway's health route.
        timeout: seconds that each request to the process may take.
        credentials: token and TLS of the cluster.

    Raises:
        errors.DvdError: the process does not answer, or answers that it cannot do its work.
    """
    if address.startswith(("http://", "https://")):
        return await _check_gateway(address, timeout, credentials)
    async with rpc.open_channel(address, credentials) as channel:
        try:
            description = await vision_pb2_grpc.VisionStub(channel).Describe(
                pb.DescribeRequest(), timeout=timeout, metadata=credentials.metadata
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
                raise errors.Unavailable(f"no worker answers ({error.code().name.lower()}): {error.details()}") from None
        else:
            _check_state(description.draining, description.stalled)
            dtype = messages.dtype_from_proto(description.dtype)
            return f"vision worker of {description.checkpoint.family}, {dtype} on {description.device}"
        return await _check_language_worker(channel, address, timeout, credentials)


def _check_state(draining: bool, stalled: str = "") -> None:
    """Raise `errors.Unavailable` if a worker that answers reports that it should get no requests."""
    if stalled:
        raise errors.Unavailable(f"the worker makes no progress: {stalled}")
    if draining:
        raise errors.Unavailable("the worker is draining: it finishes its requests and gets no new ones")


async def _check_language_worker(channel: grpc.aio.Channel, address: str, timeout: float, credentials: Credentials) -> str:
    """Check the sink at `address` and vLLM, whose address the sink reports, as the gateway does."""
    with rpc.translate_errors("language worker", quiet=True):
        description = await embeddings_pb2_grpc.EmbeddingSinkStub(channel).Describe(
            pb.DescribeRequest(), timeout=timeout, metadata=credentials.metadata
        )
    _check_state(description.draining)
    if is_unreachable_loopback(description.http, address):
        port = description.http.rpartition(":")[2]
        log.warning(
            "vLLM listens on %s, which other machines cannot reach: start the language worker with --http=0.0.0.0:%s",
            description.http, port,
        )  # fmt: skip
    vllm = vllm_address(description.http, address)
    try:
        status, _ = await http_get(vllm, "/health", timeout, credentials)
    except errors.Unavailable as error:
        raise errors.Unavailable(f"vLLM at {vllm} does not answer: {error}") from None
    if status != 200:
        raise errors.Unavailable(f"vLLM at {vllm} answered /health with status {status}, expected 200")
    model_dtype = messages.dtype_from_proto(messages.model_dtype(description))
    dtype = messages.dtype_from_proto(description.dtype)
    narrow = f" in {dtype}" if dtype != model_dtype else ""
    usage = f"{description.used_bytes >> 20} of {description.budget_bytes >> 20} MiB of embeddings{narrow}"
    return f"language worker of {description.checkpoint.family}, {model_dtype}, {usage}"


async def _check_gateway(url: str, timeout: float, credentials: Credentials) -> str:
    """Return the status of a gateway's health route. Raises: `errors.Unavailable` with its reasons if that is not 200."""
    parts = urlsplit(url)
    path = f"{parts.path}?{parts.query}" if parts.query else parts.path
    try:
        status, body = await http_get(parts.netloc, path, timeout, credentials if parts.scheme == "https" else OPEN)
    except errors.Unavailable as error:
        raise errors.Unavailable(f"no gateway answers: {error}") from None
    if status != 200:
        raise errors.Unavailable(f"{status} {_reasons(body)}".strip())
    return str(status)


def _reasons(body: bytes) -> str:
    """Return the reasons in the body of /health/ready, or an empty string if there are none."""
    try:
        return "; ".join(json.loads(body)["reasons"])
    except (ValueError, LookupError, TypeError):
        return ""

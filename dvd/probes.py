"""Readiness probes of the processes that `dvd up` starts. A probe returns whether the process is ready, and never raises."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from common import errors, rpc
from common.security import Credentials
from protos import embeddings_pb2 as pb
from protos import embeddings_pb2_grpc, vision_pb2_grpc

Probe = Callable[[], Awaitable[bool]]

_REDIS_TIMEOUT_SECONDS = 2.0
_GRPC_TIMEOUT_SECONDS = 2.0


async def redis_is_ready(socket: Path) -> bool:
    """Return whether the Redis server at a Unix socket answers PING."""
    try:
        async with asyncio.timeout(_REDIS_TIMEOUT_SECONDS):
            reader, writer = await asyncio.open_unix_connection(socket)
            writer.write(b"PING\r\n")
            reply = await reader.readline()
            writer.close()
    except (OSError, TimeoutError):
        return False
    return reply == b"+PONG\r\n"


async def vision_is_ready(address: str, credentials: Credentials) -> bool:
    """Return whether the vision worker at `address` answers Describe."""
    async with rpc.open_channel(address) as channel:
        return await _answers(vision_pb2_grpc.VisionStub(channel).Describe, credentials)


async def sink_is_ready(address: str, credentials: Credentials) -> bool:
    """Return whether the sink of a language worker at `address` answers Describe."""
    async with rpc.open_channel(address) as channel:
        return await _answers(embeddings_pb2_grpc.EmbeddingSinkStub(channel).Describe, credentials)


async def _answers(describe: Callable[..., Awaitable[object]], credentials: Credentials) -> bool:
    try:
        with rpc.translate_errors("worker", quiet=True):
            await describe(pb.DescribeRequest(), timeout=_GRPC_TIMEOUT_SECONDS, metadata=credentials.metadata)
    except errors.DvdError:
        return False
    return True

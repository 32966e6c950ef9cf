"""`dvd health ADDRESS`: whether what listens there can do its work, for container engines and people.

Runs in the image of every process, so what only one of them has installed is imported when it is needed.
"""

import asyncio
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence

import grpc

from common import errors, messages, rpc
from common.options import ConfigError, read_options
from dvd.config import HealthOptions
from protos import embeddings_pb2 as pb
from protos import vision_pb2_grpc


def main(arguments: Sequence[str]) -> None:
    """One line of what was found. Exits 1 where nothing answers or what answers is not well, 2 on a bad option."""
    try:
        options = read_options(HealthOptions, arguments)
    except ConfigError as error:
        print(f"dvd health: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        found = asyncio.run(check(options.address, options.timeout))
    except errors.DvdError as error:
        sys.exit(f"dvd health: {options.address}: {error}")
    print(f"{options.address}: {found}")


async def check(address: str, timeout: float) -> str:
    """What is found at a worker's address or a gateway's URL, where it is well. Raises `DvdError` where it is not."""
    if address.startswith("http://"):
        return await asyncio.to_thread(_http, address, timeout)
    async with rpc.open_channel(address) as channel:
        try:
            said = await vision_pb2_grpc.VisionStub(channel).Describe(pb.DescribeRequest(), timeout=timeout)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
                raise errors.Unavailable(f"no worker answers ({error.code().name.lower()}): {error.details()}") from None
        else:
            return f"vision worker of {said.checkpoint.family}, {messages.dtype_from_proto(said.dtype)} on {said.device}"
    return await _language(address, timeout)


async def _language(address: str, timeout: float) -> str:
    """The sink and vLLM, as the gateway asks them."""
    from server.workers.clients import LanguageClient

    client = LanguageClient(address)
    try:
        said = await client.describe(timeout)
        await client.get("/health", timeout)
    finally:
        await client.close()
    kept = f"{said.used_bytes >> 20} of {said.budget_bytes >> 20} MiB of embeddings"
    return f"language worker of {said.checkpoint.family}, {messages.dtype_from_proto(said.dtype)}, {kept}"


def _http(url: str, timeout: float) -> str:
    """The answer of a gateway's route. Raises `Unavailable` with its reasons where that is not 200."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy of the environment is for other hosts
    try:
        with direct.open(url, timeout=timeout) as answer:
            return str(answer.status)
    except urllib.error.HTTPError as error:
        raise errors.Unavailable(f"{error.code} {_reasons(error.read())}".strip()) from None
    except OSError as error:
        raise errors.Unavailable(f"no gateway answers: {error}") from None


def _reasons(body: bytes) -> str:
    try:
        return "; ".join(json.loads(body)["reasons"])
    except (ValueError, LookupError, TypeError):
        return ""

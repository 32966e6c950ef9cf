"""The sink's side of Deliver calls without gRPC (`common/transport/local_call.py`), from senders on the same machine."""

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Protocol

from common import embedding_stream, errors, logs
from common.security import HEADER, TOKEN_REJECTED, Credentials
from common.transport import base
from common.transport.local_call import frame, read_message
from protos import embeddings_pb2 as pb

log = logging.getLogger("dvd.sink")


class _Servicer(Protocol):
    async def Deliver(self, request: AsyncIterator[bytes], context: Any) -> pb.DeliverReply: ...  # noqa: N802


class _Context:
    """What a sink uses of the context of a gRPC call."""

    def __init__(self, metadata: Mapping[str, str], writer: asyncio.StreamWriter) -> None:
        self._metadata, self._writer = metadata, writer

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return tuple(self._metadata.items())

    async def send_initial_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None:
        self._writer.write(frame(json.dumps({"offers": base.parse_offers(metadata)}).encode()))


class LocalCallServer:
    """Serves the calls of one sink at a path. They need the cluster token, and the permissions of its folder."""

    def __init__(
        self, path: str, sink: _Servicer, credentials: Credentials, on_refused: Callable[[], None] = lambda: None
    ) -> None:
        self._path, self._sink, self._credentials, self._on_refused = path, sink, credentials, on_refused
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen from now on. Without, senders use gRPC: a path that is too long for a socket is only logged."""
        try:
            self._server = await asyncio.start_unix_server(self._serve, self._path)
        except OSError as error:
            log.warning("no local calls, senders use gRPC: %s", error)

    async def close(self) -> None:
        """Remove the socket and close all connections; calls in flight end."""
        if self._server is None:
            return
        self._server.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while True:
                metadata = _parse_metadata(await read_message(reader))
                logs.request_id.set("")  # that of the call before
                answer = await self._answer(reader, _Context(metadata, writer))
                writer.write(frame(json.dumps(answer).encode()))
                await writer.drain()
        except (OSError, EOFError, errors.InvalidRequest, asyncio.CancelledError):  # the last one in `close` only
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, context: _Context) -> dict[str, Any]:
        messages = _messages(reader)
        try:
            if not self._credentials.accepts(dict(context.invocation_metadata()).get(HEADER)):
                self._on_refused()
                await anext(messages, None)  # the next message begins the next call
                raise errors.Unauthorized(TOKEN_REJECTED)
            reply = await self._sink.Deliver(messages, context)
        except errors.DvdError as error:
            return {"error": error.code, "message": str(error)}
        except EOFError:
            raise
        except Exception:
            log.exception("unexpected error in a local call")
            return {"error": errors.InternalError.code, "message": "internal error; see this worker's log"}
        return {"already_here": reply.already_here}


def _parse_metadata(message: bytes) -> dict[str, str]:
    """Return the metadata of a call. Raises `InvalidRequest` if the message is not metadata."""
    try:
        metadata = dict(json.loads(message))
    except (ValueError, TypeError, RecursionError):
        metadata = {"": None}
    if not all(isinstance(part, str) for item in metadata.items() for part in item):
        raise errors.InvalidRequest("invalid metadata of a local call: expected a list of pairs of texts")
    return metadata


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Yield the messages of a call. It ends early if the sender closes the connection: its delivery is then incomplete."""
    with contextlib.suppress(EOFError):
        while True:
            message = await read_message(reader)
            yield message
            if isinstance(part := embedding_stream.parse_message(message), pb.DeliverChunk) and part.HasField("placed"):
                return

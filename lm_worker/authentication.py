"""The cluster token at vLLM's own port. vLLM's `--api-key` guards a few prefixes of paths only."""

import json
from typing import Any

from common import errors
from common.security import HEADER, OPEN, TOKEN_REJECTED, Credentials

_OPEN_PATHS = frozenset({"/health", "/metrics", "/metrics/"})
"""Read-only paths, for supervisors and Prometheus."""
_POLICY_VIOLATION = 1008


class RequireToken:
    """ASGI middleware, named by vLLM's flag `--middleware`: answers 401 to requests without the cluster token.

    vLLM constructs it with the application alone, so `credentials` belongs to the class. It is set before vLLM's server starts.
    """

    credentials: Credentials = OPEN

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve a request if it has the token or its path needs none."""
        if scope["type"] == "lifespan" or scope["path"] in _OPEN_PATHS or self._has_token(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
        else:
            error = errors.Unauthorized(TOKEN_REJECTED)
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": error.status.value, "headers": headers})
            await send({"type": "http.response.body", "body": json.dumps(error.body()).encode()})

    def _has_token(self, scope: Any) -> bool:
        values = [value for name, value in scope["headers"] if name == HEADER.encode()]
        return self.credentials.accepts(values[0] if len(values) == 1 else None)

"""`python -m server`: the gateway."""

import logging
import socket
import sys
from collections.abc import Sequence

import uvicorn

from server.app import create_app
from wire import config

_GRACE = 15
"""Seconds that answers in flight have to end after a signal."""


_MAX_HEAD = 64 << 10
"""Bytes of a request's head; of uvicorn's two parsers only h11 can be told."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run until a signal. Exits 2 on a bad option, 1 where it cannot listen, with one line that says why."""
    try:
        options = config.read(config.Gateway, sys.argv[1:] if arguments is None else arguments)
    except config.ConfigError as error:
        print(f"dvd gateway: {error}", file=sys.stderr)
        sys.exit(2)
    logging.basicConfig(level=options.log_level.upper(), stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    try:
        listening = _listen(options.host, options.port)
    except OSError as error:
        sys.exit(f"dvd gateway: cannot listen on {options.host}:{options.port}: {error.strerror}; choose another --port")
    serving = uvicorn.Config(
        create_app(options),
        http="h11",
        h11_max_incomplete_event_size=_MAX_HEAD,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE,
    )
    print(f"dvd gateway: listening on http://{options.host}:{listening.getsockname()[1]}", file=sys.stderr, flush=True)
    uvicorn.Server(serving).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind((host, port))
    listening.listen(2048)
    return listening


if __name__ == "__main__":
    main()

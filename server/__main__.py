"""`python -m server`: the gateway."""

import functools
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack

import uvicorn
from uvicorn.supervisors import Multiprocess

from common import logs
from common.options import ConfigError, read_options
from server.app import in_this_process
from server.config import GatewayOptions
from server.http.protocol import served

log = logging.getLogger("dvd.gateway")

_GRACE = 15
"""Seconds that answers in flight have to end after a signal."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run until a signal. Exits 2 on a bad option, 1 where it cannot listen, with one line that says why."""
    try:
        options = read_options(GatewayOptions, sys.argv[1:] if arguments is None else arguments)
    except ConfigError as error:
        print(f"dvd gateway: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        listening = _listen(options.host, options.port)
    except OSError as error:
        sys.exit(f"dvd gateway: cannot listen on {options.host}:{options.port}: {error.strerror}; choose another --port")
    each = options.model_copy(update={"max_in_flight": -(-options.max_in_flight // options.workers)})
    serving = served(functools.partial(in_this_process, each), _GRACE, factory=True, workers=options.workers)
    logs.configure(options.log_level, options.log_format)
    log.info("listening on http://%s:%d", options.host, listening.getsockname()[1])
    if options.workers == 1:
        uvicorn.Server(serving).run(sockets=[listening])
        return
    with ExitStack() as held:
        # where prometheus-client lets several processes count together; it reads the variable when it is first imported
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = held.enter_context(tempfile.TemporaryDirectory(prefix="dvd-metrics-"))
        Multiprocess(serving, [listening]).run()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind((host, port))
    listening.listen(2048)
    return listening


if __name__ == "__main__":
    main()

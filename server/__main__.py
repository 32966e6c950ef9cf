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
from common.options import ConfigError, logging_options, read_options
from server.app import create_worker_app
from server.config import GatewayOptions
from server.http.protocol import uvicorn_config

log = logging.getLogger("dvd.gateway")

_SHUTDOWN_TIMEOUT_SECONDS = 15
"""Time for responses in flight to end after a signal."""

_PROCESS_START_SECONDS = 30
"""Time for one of several processes to answer its parent, which replaces it otherwise: importing takes seconds."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the gateway until a signal.

    Exits with status 2 on an invalid option and with 1 if it cannot listen, each with one line that gives the reason.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        options = read_options(GatewayOptions, arguments)
    except ConfigError as error:
        logs.exit_with_error("dvd gateway", str(error), logging_options(arguments).log_format, 2)
    try:
        listener = _listen(options.host, options.port)
    except OSError as error:
        reason = f"cannot listen on {options.host}:{options.port}: {error.strerror}; choose another --port"
        logs.exit_with_error("dvd gateway", reason, options.log_format)
    process_options = options.model_copy(update={"max_in_flight": -(-options.max_in_flight // options.workers)})
    config = uvicorn_config(
        functools.partial(create_worker_app, process_options),
        _SHUTDOWN_TIMEOUT_SECONDS,
        factory=True,
        workers=options.workers,
        timeout_keep_alive=options.keep_alive_timeout,
        timeout_worker_healthcheck=_PROCESS_START_SECONDS,
    )
    logs.configure(options.log_level, options.log_format)
    log.info("listening on http://%s:%d", options.host, listener.getsockname()[1])
    if options.workers == 1:
        uvicorn.Server(config).run(sockets=[listener])
        return
    if options.log_level == "info":
        logging.getLogger("uvicorn.error").setLevel(logging.INFO)  # at this level it logs that a process has died
    with ExitStack() as resources:
        # prometheus-client aggregates processes through files here; it reads the variable when it is first imported
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = resources.enter_context(tempfile.TemporaryDirectory(prefix="dvd-metrics-"))
        Multiprocess(config, [listener]).run()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(2048)
    return listener


if __name__ == "__main__":
    main()

"""`python -m server`: the gateway."""

import asyncio
import contextlib
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence

from common import logs
from common.admin import AdminServer
from common.options import ConfigError, logging_options, read_options
from common.security import check_listeners, read_credentials
from server.config import GatewayOptions
from server.http.server import GracefulServer
from server.processes import GatewayProcesses, create_server, serve

log = logging.getLogger("dvd.gateway")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the gateway until a signal, or until it is drained.

    Exits with status 2 on an invalid option and with 1 if it cannot listen, each with one line that gives the reason.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        options = read_options(GatewayOptions, arguments)
        logs.configure(options.log_level, options.log_format)
        check_listeners(options, read_credentials(options), {"--admin": options.admin})
    except ConfigError as error:
        logs.exit_with_error("dvd gateway", str(error), logging_options(arguments).log_format, 2)
    try:
        listener = _listen(options.host, options.port)
    except OSError as error:
        reason = f"cannot listen on {options.host}:{options.port}: {error.strerror}; choose another --port"
        logs.exit_with_error("dvd gateway", reason, options.log_format)
    log.info("listening on %s://%s:%d", "https" if options.tls_cert else "http", options.host, listener.getsockname()[1])
    if options.workers == 1:
        _run_one(options, listener)
    elif not _run_several(options, listener):
        logs.exit_with_error("dvd gateway", "a process cannot start; see its last lines above", options.log_format)


def _run_one(options: GatewayOptions, listener: socket.socket) -> None:
    server = create_server(options)
    runner = asyncio.Runner(loop_factory=server.config.get_loop_factory())
    with runner, _admin_server(options, runner.get_loop(), server):
        runner.run(serve(server, listener))


def _run_several(options: GatewayOptions, listener: socket.socket) -> bool:
    """Returns False if a process could not start."""
    names = ("max_in_flight", "max_bodies_bytes", "max_connections")  # limits that the processes share
    share = options.model_copy(update={name: -(-getattr(options, name) // options.workers) for name in names})
    processes = GatewayProcesses(share, options.workers, listener)
    with tempfile.TemporaryDirectory(prefix="dvd-metrics-") as folder, asyncio.Runner() as runner:
        # prometheus-client aggregates processes through files here; it reads the variable when it is first imported
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        with _admin_server(options, runner.get_loop(), processes):
            return runner.run(processes.run())


@contextlib.contextmanager
def _admin_server(
    options: GatewayOptions, loop: asyncio.AbstractEventLoop, serving: GracefulServer | GatewayProcesses
) -> Iterator[None]:
    """Serve `--admin` during the block, if it is set. Exits with status 1 if that address cannot be bound."""
    if options.admin is None:
        yield
        return
    try:
        admin = AdminServer(
            options.admin, lambda: loop.call_soon_threadsafe(serving.drain), serving.status, read_credentials(options)
        )
    except OSError as error:
        logs.exit_with_error("dvd gateway", str(error), options.log_format)
    with admin:
        log.info("admin listener on %s", options.admin)
        yield


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(2048)
    return listener


if __name__ == "__main__":
    main()

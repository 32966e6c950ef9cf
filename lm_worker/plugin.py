"""vLLM's general plugin: loaded in every process of vLLM, acts only in those of a language worker.

A plugin is seen by every vLLM of the environment, so a plain `vllm serve` beside a language worker must not find its model
class replaced: hence the variable.
"""

import os

ENABLED = "DVD_LANGUAGE_WORKER"
"""Set by the language worker, inherited by vLLM's processes."""

LOGGED = "DVD_LANGUAGE_WORKER_LOG"
"""Likewise: level and format of what we log there."""

MEDIA_CONNECTOR = "dvd-refuse"

_MODEL = "lm_worker.models.internvl:InternVLLanguageModel"


def register() -> None:
    """Register the model class, the configurations and the media connector. May run several times."""
    if ENABLED not in os.environ:
        return
    from vllm import ModelRegistry
    from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

    from common import logs
    from lm_worker.configuration import register_configurations
    from lm_worker.media import RefuseMedia

    level, form = os.environ.get(LOGGED, "info text").split()
    logs.configure(level, form, "lm_worker", "common")  # the rest is vLLM's, which has a format of its own
    register_configurations()
    for architecture in ("InternVLChatModel", "InternVLForConditionalGeneration"):
        ModelRegistry.register_model(architecture, _MODEL)
    MEDIA_CONNECTOR_REGISTRY.register(MEDIA_CONNECTOR)(RefuseMedia)

"""Configuration classes for `transformers` that published checkpoints provide as remote code.

With these classes, loading a configuration needs no `trust_remote_code` and no Python file of the checkpoint.
"""

from typing import Any

from transformers import AutoConfig, PretrainedConfig


class InternLM2Config(PretrainedConfig):
    """Language model of InternVL 1.5 and 2 (20B, 8B, 2B). Attributes are named as in its published `config.json`."""

    model_type = "internlm2"


class InternLM3Config(PretrainedConfig):
    """Language model of InternVL 3 (9B). Attributes are named as in its published `config.json`."""

    model_type = "internlm3"


class InternVLChatConfig(PretrainedConfig):
    """A checkpoint in OpenGVLab's layout. `text_config` is what its `config.json` calls `llm_config`."""

    model_type = "internvl_chat"
    is_composition = True
    has_no_defaults_at_init = True

    def __init__(self, vision_config: Any = None, llm_config: Any = None, **kwargs: Any) -> None:
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        self.text_config = _text_config(llm_config or {})
        # transformers 5 copies the composite's dtype into the text part only if that part has none
        super().__init__(**kwargs)

    def get_text_config(self, *_args: Any, **_kwargs: Any) -> PretrainedConfig:
        """Configuration of the language model."""
        return self.text_config


def _text_config(values: dict[str, Any]) -> PretrainedConfig:
    # auto_map names code in the checkpoint's folder; vLLM and transformers implement all of these architectures
    values = {k: v for k, v in values.items() if k != "auto_map"}
    model_type = values.pop("model_type")
    scaling = values.get("rope_scaling") or {}
    if scaling.get("type") == "su":  # Phi-3's first name for longrope; transformers 5 renames it too late for itself
        values["rope_scaling"] = {**scaling, "type": "longrope"}
    return AutoConfig.for_model(model_type, **values)


def register_configurations() -> None:
    """Register the classes of this module with `AutoConfig`. May run several times."""
    for config in (InternLM2Config, InternLM3Config, InternVLChatConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)

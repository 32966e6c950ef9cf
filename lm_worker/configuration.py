"""transformers configurations that published checkpoints bring as files of their own, so that no remote code is needed."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig


class InternLM2Config(PretrainedConfig):
    """The language model of InternVL 1.5 and 2 (20B, 8B, 2B). Names as in its published `config.json`."""

    model_type = "internlm2"


class InternLM3Config(PretrainedConfig):
    """The language model of InternVL 3 (9B)."""

    model_type = "internlm3"


class InternVLChatConfig(PretrainedConfig):
    """OpenGVLab's layout. `text_config` is what the checkpoint calls `llm_config`."""

    model_type = "internvl_chat"
    is_composition = True
    has_no_defaults_at_init = True

    def __init__(self, vision_config: Any = None, llm_config: Any = None, **kwargs: Any) -> None:
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        self.text_config = _text_config(llm_config or {})
        # transformers 5 drops the composite's own dtype into the text part only if that part has none
        super().__init__(**kwargs)

    def get_text_config(self, *_args: Any, **_kwargs: Any) -> PretrainedConfig:
        return self.text_config


def _text_config(values: dict[str, Any]) -> PretrainedConfig:
    # an export names files beside the checkpoint; vLLM and transformers know every one of these architectures
    values = {k: v for k, v in values.items() if k != "auto_map"}
    model_type = values.pop("model_type")
    scaling = values.get("rope_scaling") or {}
    if scaling.get("type") == "su":  # Phi-3's first name for longrope; transformers 5 renames it too late for itself
        values["rope_scaling"] = {**scaling, "type": "longrope"}
    return AutoConfig.for_model(model_type, **values)


def register_configurations() -> None:
    """Make `AutoConfig` know them. May run several times."""
    for config in (InternLM2Config, InternLM3Config, InternVLChatConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)

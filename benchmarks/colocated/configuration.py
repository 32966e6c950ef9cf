"""Configuration class of an `internvl_chat` checkpoint, copied into the checkpoint and loaded from there by transformers."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig


class InternVisionConfig(PretrainedConfig):
    """Configuration of the vision tower."""

    model_type = "intern_vit_6b"


class InternVLChatConfig(PretrainedConfig):
    """Configuration of the whole model, with those of the vision tower and the language model."""

    model_type = "internvl_chat"
    is_composition = True

    def __init__(self, vision_config: dict[str, Any] | None = None, llm_config: dict[str, Any] | None = None, **rest: Any):
        self.vision_config = InternVisionConfig(**(vision_config or {}))
        text = dict(llm_config or {"model_type": "qwen3"})
        self.llm_config = AutoConfig.for_model(text.pop("model_type"), **text)
        super().__init__(**rest)

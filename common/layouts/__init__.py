"""Layouts of checkpoints, by `model_type` of their config.json. A new one is a file here and an entry in `LAYOUTS`."""

from common.layouts import huggingface, opengvlab
from common.layouts.base import Layout

LAYOUTS: dict[str, Layout] = {
    "internvl_chat": opengvlab.LAYOUT,  # OpenGVLab: InternVLChatModel
    "internvl": huggingface.LAYOUT,  # transformers: InternVLForConditionalGeneration
}

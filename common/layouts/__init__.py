"""The layouts a checkpoint may come in. A new one is a file here and a line in `LAYOUTS`."""

from common.layouts import huggingface, opengvlab
from common.layouts.base import Layout

LAYOUTS: dict[str, Layout] = {
    "internvl_chat": opengvlab.LAYOUT,  # OpenGVLab's own: InternVLChatModel
    "internvl": huggingface.LAYOUT,  # transformers': InternVLForConditionalGeneration
}

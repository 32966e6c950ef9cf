"""The layouts a checkpoint may come in. A new one is a file here and a line in `LAYOUTS`."""

from wire.layouts import native, official
from wire.layouts.base import Layout

LAYOUTS: dict[str, Layout] = {
    "internvl_chat": official.LAYOUT,  # OpenGVLab's own: InternVLChatModel
    "internvl": native.LAYOUT,  # transformers': InternVLForConditionalGeneration
}

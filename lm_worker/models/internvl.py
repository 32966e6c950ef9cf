"""The language model of an InternVL checkpoint as a model of vLLM, without the vision tower and the image processor.

To vLLM an image is a number of visual tokens. Its embedding enters vLLM's encoder cache through `lm_worker/connector.py`.
"""

import functools
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import BatchFeature
from vllm.config import VllmConfig
from vllm.inputs import MultiModalInput
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import DictEmbeddingItems, MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
    TimingContext,
)
from vllm.sequence import IntermediateTensors

from common.checkpoint import open_checkpoint
from common.embedding_ref import EmbeddingRef
from common.layouts import LAYOUTS
from lm_worker.image_parts import NUM_TOKENS, check_keys, check_token_count
from lm_worker.renderer import IMAGE_MARK

log = logging.getLogger("dvd.language")

_IMAGE_CONTEXT, _IMAGE_START, _IMAGE_END = "<IMG_CONTEXT>", "<img>", "</img>"
_TRANSFORMERS_MODEL_TYPE = "internvl"


class KeyedItems(DictEmbeddingItems):
    """Images of one request.

    Attributes:
        keys: Keys of images that came as URLs, which contain them; empty for images of a chat, whose keys vLLM has
            taken from `uuid`.
    """

    keys: Sequence[str] = ()


class ImageParser(MultiModalDataParser):
    """Parses images given as numbers of visual tokens, `{"image_num_tokens": [N]}`, or as `EmbeddingRef`s."""

    embedding_fields = {"image": {NUM_TOKENS: "metadata", "image_embeds": "values"}}  # noqa: RUF012

    def __init__(self, *, max_tokens: int, **options: Any) -> None:
        """`max_tokens` is the length of the model's context; the other options are vLLM's."""
        super().__init__(**options)
        self._max_tokens = max_tokens

    def _parse_image_data(self, data: Any) -> DictEmbeddingItems | None:
        if not data:
            return None
        if isinstance(data, list) and all(isinstance(image, EmbeddingRef) for image in data):
            items = self._items({NUM_TOKENS: torch.tensor([[image.tokens] for image in data])})
            items.keys = [image.key for image in data]
            return items
        if not isinstance(data, dict):
            raise ValueError(
                f"A language worker takes an image as its number of visual tokens, got {type(data).__name__}; "
                "send the request to the gateway."
            )
        return self._items(data)

    def _items(self, data: Mapping[str, torch.Tensor]) -> KeyedItems:
        counts = data.get(NUM_TOKENS)
        for count in counts.flatten().tolist() if isinstance(counts, torch.Tensor) else [counts]:
            check_token_count(count, self._max_tokens)
        required, optional = self.embedding_field_sets("image")
        return KeyedItems(data, modality="image", required_fields=required, optional_fields=optional, fields_factory=_fields)


def _fields(_data: Mapping[str, Any]) -> Mapping[str, MultiModalFieldConfig]:
    return {
        # keep_on_cpu: vLLM drops other fields when a prefix is cached
        NUM_TOKENS: MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        "image_embeds": MultiModalFieldConfig.batched("image"),
    }


class ProcessingInfo(BaseProcessingInfo):
    """What vLLM must know about images in general."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of images."""
        return {"image": None}

    def validate_num_items(self, modality: str, num_items: int) -> None:
        """Accept any number of images. Raises what vLLM raises for other modalities."""
        # the limit of 0 on the command line keeps vLLM from profiling images; anything that is not an
        # embedding was rejected when vLLM parsed or fetched it
        if modality != "image":
            super().validate_num_items(modality, num_items)

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Visual tokens of the largest image: the context, since a caller may ask for more tiles than the default."""
        # vLLM sizes its encoder cache by this: with 0 it would reject every image
        return {"image": seq_len}

    def get_data_parser(self) -> MultiModalDataParser:
        """The parser of images."""
        return ImageParser(
            max_tokens=self.ctx.model_config.max_model_len,
            expected_hidden_size=self._get_expected_hidden_size(),
            allow_missing_mm_embeddings=self.allow_missing_mm_embeddings,
        )

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        """None."""
        return {}

    @property
    def placeholder(self) -> str:
        """What a chat template writes for one image: `<image>` in OpenGVLab's layout, the context token in transformers'."""
        return _IMAGE_CONTEXT if self.get_hf_config().model_type == _TRANSFORMERS_MODEL_TYPE else "<image>"


class DummyInputs(BaseDummyInputsBuilder[ProcessingInfo]):
    """Empty inputs for vLLM's profiling: there is no vision tower to profile."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """Empty."""
        return ""

    def get_dummy_mm_data(self, *_args: Any, **_kwargs: Any) -> dict[str, Any]:
        """Empty."""
        return {}


class Processor(BaseMultiModalProcessor[ProcessingInfo]):
    """Replaces the mark of each image by `<img>`, one `<IMG_CONTEXT>` per visual token, and `</img>`."""

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        """Process a prompt; vLLM identifies each image by its key, which the connector looks up, not by a digest."""
        context = self.info.get_tokenizer().convert_tokens_to_ids(_IMAGE_CONTEXT)
        if context in inputs.prompt:  # in a caller's text: the images are marks still
            inputs.prompt = replace_token(inputs.prompt, context, self._context_as_text)
        images = inputs.mm_data_items.get("image")
        if isinstance(images, KeyedItems) and images.keys:
            inputs.mm_uuid_items = {**(inputs.mm_uuid_items or {}), "image": images.keys}
        if images is not None and images.get_count():
            check_keys((inputs.mm_uuid_items or {}).get("image") or [None])
        return super().apply(inputs, timing_ctx)

    @functools.cached_property
    def _context_as_text(self) -> list[int]:
        return ordinary_tokens(self.info.get_tokenizer(), _IMAGE_CONTEXT)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return _fields(hf_inputs)

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        tokenizer = self.info.get_tokenizer()
        start, context, end = (tokenizer.convert_tokens_to_ids(t) for t in (_IMAGE_START, _IMAGE_CONTEXT, _IMAGE_END))

        def visual_tokens(item: int) -> PromptUpdateDetails:
            count = int(mm_items.get_items("image", DictEmbeddingItems).get(item)[NUM_TOKENS])
            return PromptUpdateDetails.select_token_id([start, *[context] * count, end], embed_token_id=context)

        target = tokenizer.encode(IMAGE_MARK, add_special_tokens=False)
        return [PromptReplacement(modality="image", target=target, replacement=visual_tokens)]


def ordinary_tokens(tokenizer: Any, special: str) -> list[int]:
    """Return the text of a special token as ordinary tokens: those of two parts of it, which decode to it if possible."""
    halves = ((special[:i], special[i:]) for i in range(1, len(special)))
    encoded = [[token for half in pair for token in tokenizer.encode(half, add_special_tokens=False)] for pair in halves]
    return next((tokens for tokens in encoded if tokenizer.decode(tokens) == special), encoded[0])


def replace_token(tokens: Sequence[int], token: int, replacement: Sequence[int]) -> list[int]:
    """Return `tokens` with `replacement` in place of each `token`."""
    return [new for old in tokens for new in (replacement if old == token else (old,))]


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=DummyInputs)
class InternVLLanguageModel(nn.Module, SupportsMultiModal, SupportsPP, SupportsLoRA):
    """The language model of a checkpoint, of any architecture that vLLM implements."""

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Placeholder for chat templates without image parts. Raises `ValueError` for other modalities.

        Checkpoints in transformers' layout all have templates with image parts.
        """
        if not modality.startswith("image"):
            raise ValueError(f"{modality!r} inputs are not supported; expected an image.")
        return "<image>"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self._layout = LAYOUTS[config.model_type]
        if open_checkpoint(vllm_config.model_config.model).lacks_files:
            # vLLM requires every file of the index, also those with vision tensors alone, unless a model names patterns
            self.allow_patterns_overrides = ["*.safetensors"]
        self._next_phase = "warming up" if vllm_config.model_config.enforce_eager else "compiling and warming up"
        mark: Any = self._mark_language_model  # typed as Tensor | Module, like every attribute of nn.Module
        with mark(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.get_text_config(),
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self.make_empty_intermediate_tensors: Any = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, **kwargs: object) -> Any:
        """Never called: the connector has put every embedding into the encoder cache. Raises `RuntimeError`."""
        raise RuntimeError("An image was scheduled before its embedding arrived.")

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **_kwargs: object,
    ) -> Any:
        """Compute the hidden states `[tokens, width]` of the language model."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(
            input_ids=input_ids,
            positions=positions,
            intermediate_tensors=intermediate_tensors,
            inputs_embeds=inputs_embeds,
        )

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Compute the logits `[tokens, vocabulary]`."""
        return cast(torch.Tensor | None, self.language_model.compute_logits(hidden_states))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the language model's tensors and return their names. Others are skipped; mapped lazily, they are not read."""
        mapper = WeightsMapper(orig_to_new_prefix=dict(self._layout.language_prefixes))
        log.info("reading weights")
        started = time.monotonic()
        names = cast(set[str], AutoWeightsLoader(self).load_weights(weights, mapper=mapper))
        log.info("read weights in %.1f s; %s", time.monotonic() - started, self._next_phase)
        return names

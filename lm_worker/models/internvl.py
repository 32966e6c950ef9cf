"""The language model of an InternVL checkpoint as vLLM runs it: no vision tower, no image processor.

An image is only a number of visual tokens; its embedding reaches vLLM's encoder cache by the connector.
"""

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

from common.embedding_ref import EmbeddingRef
from common.layouts import LAYOUTS

TOKENS = "image_num_tokens"
CONTEXT, START, END = "<IMG_CONTEXT>", "<img>", "</img>"
_NATIVE = "internvl"


class KeyedItems(DictEmbeddingItems):
    """Images that came as URLs, and so with their keys inside; where a part of a chat has a key, vLLM knows it already."""

    keys: Sequence[str] = ()


class ImageParser(MultiModalDataParser):
    """Takes images as numbers of visual tokens, `{"image_num_tokens": [N]}`, or as what their URLs say."""

    embedding_fields = {"image": {TOKENS: "metadata", "image_embeds": "values"}}  # noqa: RUF012

    def _parse_image_data(self, data: Any) -> DictEmbeddingItems | None:
        if not data:
            return None
        if isinstance(data, list) and all(isinstance(one, EmbeddingRef) for one in data):
            items = self._items({TOKENS: torch.tensor([[one.tokens] for one in data])})
            items.keys = [one.key for one in data]
            return items
        if not isinstance(data, dict):
            raise ValueError("an image must come as its number of visual tokens, through the gateway")
        return self._items(data)

    def _items(self, data: Mapping[str, torch.Tensor]) -> KeyedItems:
        required, optional = self.embedding_field_sets("image")
        return KeyedItems(data, modality="image", required_fields=required, optional_fields=optional, fields_factory=_fields)


def _fields(_data: Mapping[str, Any]) -> Mapping[str, MultiModalFieldConfig]:
    return {
        TOKENS: MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        "image_embeds": MultiModalFieldConfig.batched("image"),
    }


class ProcessingInfo(BaseProcessingInfo):
    """What vLLM must know of images before one arrives."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def validate_num_items(self, modality: str, num_items: int) -> None:
        # the limit of 0 keeps vLLM from profiling images; whatever is no key has been refused when it was to be fetched
        if modality != "image":
            super().validate_num_items(modality, num_items)

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        # vLLM sizes its encoder cache by this: with 0 it would refuse every image. A caller may ask for more tiles
        # than the checkpoint's default, so only the context bounds an image.
        return {"image": seq_len}

    def get_data_parser(self) -> MultiModalDataParser:
        return ImageParser(
            expected_hidden_size=self._get_expected_hidden_size(),
            allow_missing_mm_embeddings=self.allow_missing_mm_embeddings,
        )

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        return {}

    @property
    def placeholder(self) -> str:
        """What a chat template writes for one image: `<image>` in OpenGVLab's, the context token itself in transformers'."""
        return CONTEXT if self.get_hf_config().model_type == _NATIVE else "<image>"


class DummyInputs(BaseDummyInputsBuilder[ProcessingInfo]):
    """Nothing to profile: no tower here."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return ""

    def get_dummy_mm_data(self, *_args: Any, **_kwargs: Any) -> dict[str, Any]:
        return {}


class Processor(BaseMultiModalProcessor[ProcessingInfo]):
    """Turns each placeholder into `<img>`, one `<IMG_CONTEXT>` a visual token, `</img>`."""

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        """vLLM names an image by its key, under which the connector looks for it, not by a digest of what stands for it."""
        images = inputs.mm_data_items.get("image")
        if isinstance(images, KeyedItems) and images.keys:
            inputs.mm_uuid_items = {**(inputs.mm_uuid_items or {}), "image": images.keys}
        return super().apply(inputs, timing_ctx)

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
        start, context, end = (tokenizer.convert_tokens_to_ids(t) for t in (START, CONTEXT, END))

        def visual_tokens(item: int) -> PromptUpdateDetails:
            count = int(mm_items.get_items("image", DictEmbeddingItems).get(item)[TOKENS])
            return PromptUpdateDetails.select_token_id([start, *[context] * count, end], embed_token_id=context)

        target = tokenizer.encode(self.info.placeholder, add_special_tokens=False)
        return [PromptReplacement(modality="image", target=target, replacement=visual_tokens)]


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=DummyInputs)
class InternVLLanguageModel(nn.Module, SupportsMultiModal, SupportsPP, SupportsLoRA):
    """`language_model` of the checkpoint, any architecture that vLLM knows, and nothing else of it."""

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """For templates that know no image parts; those of transformers' layout all do."""
        if not modality.startswith("image"):
            raise ValueError(f"{modality} inputs are not supported, only images")
        return "<image>"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self._layout = LAYOUTS[config.model_type]
        mark: Any = self._mark_language_model  # nn.Module claims that every attribute may be a Tensor
        with mark(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.get_text_config(),
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self.make_empty_intermediate_tensors: Any = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, **kwargs: object) -> Any:
        raise RuntimeError("an image was scheduled before its embedding arrived")

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **_kwargs: object,
    ) -> Any:
        """Hidden states `[tokens, width]` of the language model."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(
            input_ids=input_ids,
            positions=positions,
            intermediate_tensors=intermediate_tensors,
            inputs_embeds=inputs_embeds,
        )

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits `[tokens, vocabulary]`."""
        return cast(torch.Tensor | None, self.language_model.compute_logits(hidden_states))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the language model's tensors; the vision worker's are passed over unread (they are mapped lazily)."""
        mapper = WeightsMapper(orig_to_new_prefix=dict(self._layout.language_prefixes))
        return cast(set[str], AutoWeightsLoader(self).load_weights(weights, mapper=mapper))

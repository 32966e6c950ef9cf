"""vLLM's bookkeeping of its encoder cache, with which a request's prefill stops in front of an embedding that is missing."""

from typing import TYPE_CHECKING, Self

from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

from lm_worker.pins import Pins, pins_of_process

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request


class PinnedEncoderCacheManager(EncoderCacheManager):
    """An encoder cache that admits only embeddings that `lm_worker/connector.py` has pinned.

    When vLLM's scheduler may not admit an item, it ends the request's chunk of tokens just before it. What was admitted once
    stays usable as long as vLLM caches it.
    """

    def __init__(self, cache_size: int, pins: Pins) -> None:
        """Create a cache of `cache_size` embeddings, in visual tokens."""
        super().__init__(cache_size)
        self._pins = pins

    @classmethod
    def create_manager(cls, *, cache_size: int, vllm_config: "VllmConfig") -> Self:
        """Create the manager of the scheduler in this process; called by vLLM."""
        assert vllm_config.ec_transfer_config is not None
        return cls(cache_size, pins_of_process(vllm_config.ec_transfer_config.get_from_extra_config("folder", "")))

    def can_allocate(self, request: "Request", input_id: int, encoder_compute_budget: int, num_embeds_to_schedule: int) -> bool:
        """Whether the item may enter the cache in the step that is being scheduled; called by vLLM."""
        is_pinned = self._pins.is_pinned(request.mm_features[input_id].identifier)
        return is_pinned and super().can_allocate(request, input_id, encoder_compute_budget, num_embeds_to_schedule)

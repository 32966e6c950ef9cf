"""Bounds the requests that vLLM has prefilled in part: they hold KV cache while they wait for an image."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_MIN_TOKENS = 64
"""Fewer tokens are not worth a step of their own."""


class PartialPrefills:
    """The requests that may be prefilled although an embedding is missing, and how much they hold.

    Others can always be scheduled beside them, since they get neither all of the KV cache nor all places among the running
    requests.
    """

    def __init__(self, max_tokens: int, max_requests: int) -> None:
        """`max_tokens` of KV cache and `max_requests` are the most that all of them hold together."""
        self._max_tokens, self._max_requests = max_tokens, max_requests
        self._tokens: dict[str, int] = {}

    def admit(self, request_id: str, first_missing: int, computed: int) -> bool:
        """Whether vLLM may go on with a request up to its first missing embedding.

        Args:
            request_id: The request.
            first_missing: Number of tokens before the embedding.
            computed: Number of tokens that have been prefilled.
        """
        if first_missing - computed < _MIN_TOKENS:
            return False
        others = sum(tokens for name, tokens in self._tokens.items() if name != request_id)
        is_new = request_id not in self._tokens
        if others + first_missing > self._max_tokens or len(self._tokens) + is_new > self._max_requests:
            return False
        self._tokens[request_id] = first_missing
        return True

    def release(self, request_id: str) -> None:
        """Note that a request has all its embeddings, or has ended."""
        self._tokens.pop(request_id, None)


def create_partial_prefills(config: "VllmConfig", share: float) -> PartialPrefills:
    """Return the bounds for an engine: this share of its KV cache and of its places for running requests.

    They are 0, so that every request waits for its last embedding, where vLLM cannot end a chunk of a prompt at any token:
    without chunked prefill, in models with state-space layers, and with drafts that read ahead in the prompt.
    """
    can_stop_anywhere = (
        config.scheduler_config.enable_chunked_prefill
        and not config.model_config.is_hybrid
        and not config.num_prefill_lookahead_tokens
    )
    cache = config.cache_config
    if not can_stop_anywhere or not cache.num_gpu_blocks:
        return PartialPrefills(0, 0)
    tokens = cache.num_gpu_blocks * cache.block_size
    places = config.scheduler_config.max_num_active_seqs or config.scheduler_config.max_num_seqs
    return PartialPrefills(int(share * tokens), int(share * places))

"""vLLM's encoder-cache connector: embeddings from the sink's shared memory into vLLM's encoder cache.

In vLLM's scheduler it pins a request's embeddings as they arrive, and while the request lives. A request is prefilled up to
the first embedding that is missing, within the bounds of `lm_worker/partial_prefill.py`. One whose embedding has the wrong
number of rows fails, and so does one whose embedding is missing for too long although no vision worker is expected to
deliver it. In a worker of vLLM it maps what the scheduler has pinned. On a CPU the encoder cache then *is* the shared
memory; on a GPU it is copied once to the device. A narrow embedding is widened there to the model's dtype. Every rank of
tensor parallelism maps the same bytes, so all ranks of a language worker must be on one machine.
"""

import logging
import mmap
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase, ECConnectorMetadata, ECConnectorRole
from vllm.platforms import current_platform

from common import errors
from common.embedding import HEADER_SIZE, Header
from lm_worker.dequantization import CODE_DTYPES, dequantize
from lm_worker.partial_prefill import create_partial_prefills
from lm_worker.pins import pins_of_process
from lm_worker.shared_memory import is_expected, map_embedding, mark_waiting, read_header

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

log = logging.getLogger(__name__)

_IDLE_STEP_SECONDS = 0.003
"""Pause of the engine after a step in which all requests waited for embeddings: it would use a core that encodes."""


@dataclass
class EmbeddingFiles(ECConnectorMetadata):
    """Sent by the scheduler to the workers with each step: path of the file of each embedding that the step needs, by key."""

    paths: dict[str, str] = field(default_factory=dict)


class SharedMemoryConnector(ECConnectorBase):
    """One instance in vLLM's scheduler and one in each worker; vLLM calls the methods of its role only.

    Options in `ec_connector_extra_config`: `folder`, the sink's shared memory; `wait`, the seconds that a request waits for
    an embedding that nobody is expected to deliver; and `partial_share`, the largest share of the KV cache held by requests
    that are prefilled in part.
    """

    def __init__(self, vllm_config: "VllmConfig", role: ECConnectorRole) -> None:
        super().__init__(vllm_config=vllm_config, role=role)
        option = vllm_config.ec_transfer_config.get_from_extra_config
        self._folder = Path(option("folder", ""))
        self._pins = pins_of_process(option("folder", ""))
        self._wait_seconds = float(option("wait", 10.0))
        self._partial_prefills = create_partial_prefills(vllm_config, float(option("partial_share", 0.0)))
        self._dtype = vllm_config.model_config.dtype
        self._waits_for_delivery = False  # in the step that is being scheduled, for an embedding that is expected
        self._pinned_by_request: dict[str, set[str]] = {}
        self._waiting_since: dict[str, float] = {}
        self._unavailable: set[str] = set()
        self._paths: dict[str, str] = {}
        # A request may end while its step is still running, so each step also pins the embeddings that it loads.
        self._max_concurrent_steps = vllm_config.max_concurrent_batches
        self._keys_of_steps: deque[list[str]] = deque()  # oldest step first

    # Called in the scheduler.

    def ensure_cache_available(self, request: "Request", num_computed_tokens: int) -> bool:
        """Whether `request` may be scheduled: up to its end, or up to the first embedding that is missing.

        Embeddings of images that the KV cache covers are not needed.
        """
        missing = self._pin_missing(request, num_computed_tokens)
        if request.request_id in self._unavailable:
            return False
        if not missing:
            self._waiting_since.pop(request.request_id, None)
            self._partial_prefills.release(request.request_id)
            return True
        first = request.mm_features[missing[0]].mm_position.offset
        if self._partial_prefills.admit(request.request_id, first, num_computed_tokens):
            self._waiting_since.pop(request.request_id, None)
            return True
        self._limit_wait(request, missing)
        return False

    def _pin_missing(self, request: "Request", num_computed_tokens: int) -> list[int]:
        """Pin what has arrived of the images that the KV cache does not cover. Returns those whose embedding is missing."""
        pinned = self._pinned_by_request.setdefault(request.request_id, set())
        missing = []
        for index, feature in enumerate(request.mm_features):
            position = feature.mm_position
            if position.offset + position.length <= num_computed_tokens or feature.identifier in pinned:
                continue
            if not self._pin(request, index, pinned):
                missing.append(index)
        return missing

    def _limit_wait(self, request: "Request", missing: list[int]) -> None:
        """Fail a request that waits for too long. Time in which an embedding may still be delivered does not count."""
        if any(is_expected(self._folder, request.mm_features[index].identifier) for index in missing):
            self._waits_for_delivery = True
            self._waiting_since.pop(request.request_id, None)
            return
        since = self._waiting_since.setdefault(request.request_id, time.monotonic())
        if time.monotonic() - since > self._wait_seconds:
            self._fail(
                request.request_id, f"an embedding did not arrive within {self._wait_seconds:g} s (--wait-for-embeddings)"
            )

    def _pin(self, request: "Request", index: int, pinned: set[str]) -> bool:
        """Pin the embedding of image `index`, or fail the request. False if it has not arrived or cannot be used."""
        key, expected_rows = request.mm_features[index].identifier, request.get_num_encoder_embeds(index)
        try:
            if not self._pins.pin(key):
                return False
            pinned.add(key)
            rows = read_header(self._pins.path(key)).rows
        except (errors.DvdError, OSError) as error:
            self._fail(request.request_id, str(error))
            return False
        if rows != expected_rows:  # vLLM itself would accept it, and its answer would be wrong
            self._fail(request.request_id, f"embedding {key[:12]} has {rows} rows, but the request declares {expected_rows}")
        return True

    def _fail(self, request_id: str, reason: str) -> None:
        log.warning("request %s fails: %s", request_id, reason)
        self._unavailable.add(request_id)

    def has_cache_item(self, identifier: str) -> bool:
        """Whether the embedding with this key is pinned."""
        return self._pins.is_pinned(identifier)

    def update_state_after_alloc(self, request: "Request", index: int) -> None:
        """Note that the next step loads the embedding of image `index`."""
        key = request.mm_features[index].identifier
        if key not in self._paths:
            self._paths[key] = str(self._pins.path(key))
            self._pins.pin(key)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> EmbeddingFiles:
        """Embeddings that the workers load in the step that is being built.

        vLLM calls this once per step. When a step is built, the step `max_concurrent_batches` before it has ended, so
        its embeddings are unpinned.
        """
        files, self._paths = EmbeddingFiles(self._paths), {}
        if self._waits_for_delivery and not scheduler_output.total_num_scheduled_tokens:
            mark_waiting(self._folder)
            time.sleep(_IDLE_STEP_SECONDS)
        self._waits_for_delivery = False
        self._keys_of_steps.append(list(files.paths))
        while len(self._keys_of_steps) > self._max_concurrent_steps:
            for key in self._keys_of_steps.popleft():
                self._pins.unpin(key)
        return files

    def has_pending_push_work(self) -> bool:
        """Whether vLLM must build empty steps although it is idle: otherwise the pins of the last steps would stay."""
        return any(self._keys_of_steps)

    def take_unavailable_requests(self) -> set[str]:
        """Requests that vLLM must fail, each returned once."""
        taken, self._unavailable = self._unavailable, set()
        return taken

    def request_finished(self, request: "Request") -> tuple[bool, dict[str, Any] | None]:
        """Unpin what the request has pinned."""
        for key in self._pinned_by_request.pop(request.request_id, set()):
            self._pins.unpin(key)
        self._waiting_since.pop(request.request_id, None)
        self._partial_prefills.release(request.request_id)
        self._unavailable.discard(request.request_id)
        return False, None

    # Called in a worker.

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **_kwargs: Any) -> None:
        """Put the embeddings of this step into `encoder_cache`, under their keys."""
        files = self._get_connector_metadata()
        assert isinstance(files, EmbeddingFiles)
        for key, path in files.paths.items():
            if key not in encoder_cache:
                encoder_cache[key] = load_embedding(Path(path), self._dtype)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **_kwargs: Any) -> None:
        """Never called for an `ec_consumer`. Raises `RuntimeError`."""
        raise RuntimeError("A language worker consumes embeddings and computes none.")


def load_embedding(path: Path, dtype: torch.dtype) -> torch.Tensor:
    """The embedding of a file, `[rows, width]`, on this process' device; a narrow one is widened to `dtype`."""
    header, mapping = map_embedding(path)
    if header.dtype in CODE_DTYPES:
        return _load_narrow(header, mapping, dtype)
    return _to_device(_values(header, mapping, getattr(torch, header.dtype), HEADER_SIZE))


def _load_narrow(header: Header, mapping: mmap.mmap, dtype: torch.dtype) -> torch.Tensor:
    # on a GPU the copy is narrow too
    codes = _to_device(_values(header, mapping, CODE_DTYPES[header.dtype], HEADER_SIZE + header.scales_length))
    scales = _to_device(torch.frombuffer(mapping, dtype=torch.float32, offset=HEADER_SIZE, count=header.rows))
    return dequantize(scales, codes, dtype)


def _values(header: Header, mapping: mmap.mmap, dtype: torch.dtype, offset: int) -> torch.Tensor:
    values = torch.frombuffer(mapping, dtype=dtype, offset=offset, count=header.rows * header.width)
    return values.view(header.rows, header.width)


def _to_device(values: torch.Tensor) -> torch.Tensor:
    return values if current_platform.is_cpu() else values.to(current_platform.device_type, non_blocking=True)

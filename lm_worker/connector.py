"""vLLM's encoder-cache connector: embeddings from the sink's shared memory into vLLM's encoder cache.

In vLLM's scheduler it makes a request wait until all of its embeddings have arrived, pins them while the request lives,
and fails a request whose embedding does not arrive in time or has the wrong number of rows. In a worker of vLLM it maps
what the scheduler has pinned. On a CPU the encoder cache then *is* the shared memory; on a GPU it is copied once to the
device. Every rank of tensor parallelism maps the same bytes, so all ranks of a language worker must be on one machine.
"""

import logging
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase, ECConnectorMetadata, ECConnectorRole
from vllm.platforms import current_platform

from common import errors
from common.embedding import HEADER_SIZE
from lm_worker.pins import Pins
from lm_worker.shared_memory import map_embedding, read_header

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

log = logging.getLogger(__name__)


@dataclass
class EmbeddingFiles(ECConnectorMetadata):
    """Sent by the scheduler to the workers with each step: path of the file of each embedding that the step needs, by key."""

    paths: dict[str, str] = field(default_factory=dict)


class SharedMemoryConnector(ECConnectorBase):
    """One instance in vLLM's scheduler and one in each worker; vLLM calls the methods of its role only.

    Options in `ec_connector_extra_config`: `folder`, the sink's shared memory, and `wait`, the seconds that a request
    waits for an embedding.
    """

    def __init__(self, vllm_config: "VllmConfig", role: ECConnectorRole) -> None:
        super().__init__(vllm_config=vllm_config, role=role)
        option = vllm_config.ec_transfer_config.get_from_extra_config
        self._pins = Pins(Path(option("folder", "")))
        self._wait_seconds = float(option("wait", 10.0))
        self._pinned_by_request: dict[str, set[str]] = {}
        self._waiting_since: dict[str, float] = {}
        self._unavailable: set[str] = set()
        self._paths: dict[str, str] = {}
        # A request may end while its step is still running, so each step also pins the embeddings that it loads.
        self._max_concurrent_steps = vllm_config.max_concurrent_batches
        self._keys_of_steps: deque[list[str]] = deque()  # oldest step first

    # Called in the scheduler.

    def ensure_cache_available(self, request: "Request", num_computed_tokens: int) -> bool:
        """Whether `request` may be scheduled: every embedding that is not covered by the KV cache has been pinned."""
        pinned = self._pinned_by_request.setdefault(request.request_id, set())
        missing = False
        for index, feature in enumerate(request.mm_features):
            position = feature.mm_position
            if position.offset + position.length <= num_computed_tokens or feature.identifier in pinned:
                continue
            missing |= not self._pin(request, index, pinned)
        if not missing:
            self._waiting_since.pop(request.request_id, None)
            return request.request_id not in self._unavailable
        since = self._waiting_since.setdefault(request.request_id, time.monotonic())
        if time.monotonic() - since > self._wait_seconds:
            self._fail(
                request.request_id, f"an embedding did not arrive within {self._wait_seconds:g} s (--wait-for-embeddings)"
            )
        return False

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
        self._unavailable.discard(request.request_id)
        return False, None

    # Called in a worker.

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **_kwargs: Any) -> None:
        """Put the embeddings of this step into `encoder_cache`, under their keys."""
        files = self._get_connector_metadata()
        assert isinstance(files, EmbeddingFiles)
        for key, path in files.paths.items():
            if key not in encoder_cache:
                encoder_cache[key] = load_embedding(Path(path))

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **_kwargs: Any) -> None:
        """Never called for an `ec_consumer`. Raises `RuntimeError`."""
        raise RuntimeError("A language worker consumes embeddings and computes none.")


def load_embedding(path: Path) -> torch.Tensor:
    """The embedding of a file, `[rows, width]`, on this process' device."""
    header, mapping = map_embedding(path)
    values = torch.frombuffer(mapping, dtype=getattr(torch, header.dtype), offset=HEADER_SIZE, count=header.rows * header.width)
    values = values.view(header.rows, header.width)
    return values if current_platform.is_cpu() else values.to(current_platform.device_type, non_blocking=True)

"""vLLM's encoder-cache connector: embeddings from the sink's shared memory into vLLM's encoder cache.

In the scheduler it lets a request wait until all its embeddings are there, holds them while the request lives, and fails
the request whose embedding does not come or does not fit. In a worker it maps what the scheduler held. On a CPU the
encoder cache then *is* the shared memory; on a GPU one copy takes it to the device. Every rank of tensor parallelism maps
the same bytes, hence all ranks of one language worker live on one machine.
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
from lm_worker.store import Holder, map_embedding, read_header

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

log = logging.getLogger(__name__)


@dataclass
class Loads(ECConnectorMetadata):
    """From the scheduler to the workers: key and file of each embedding that this step needs."""

    files: dict[str, str] = field(default_factory=dict)


class SharedMemoryConnector(ECConnectorBase):
    """One instance in vLLM's scheduler, one in each of its workers; `role` says which."""

    def __init__(self, vllm_config: "VllmConfig", role: ECConnectorRole) -> None:
        super().__init__(vllm_config=vllm_config, role=role)
        extra = vllm_config.ec_transfer_config.get_from_extra_config
        self._holder = Holder(Path(extra("folder", "")))
        self._patience = float(extra("wait", 10.0))
        self._held: dict[str, set[str]] = {}  # request → keys
        self._waiting_since: dict[str, float] = {}
        self._unavailable: set[str] = set()
        self._loads: dict[str, str] = {}
        # A request may end while its step is under way: what the step loads is held until it is over, whoever else lets go.
        self._at_once = vllm_config.max_concurrent_batches
        self._under_way: deque[list[str]] = deque()  # keys of the last steps, oldest first

    # In the scheduler.

    def ensure_cache_available(self, request: "Request", num_computed_tokens: int) -> bool:
        held = self._held.setdefault(request.request_id, set())
        missing = False
        for index, feature in enumerate(request.mm_features):
            position = feature.mm_position
            if position.offset + position.length <= num_computed_tokens or feature.identifier in held:
                continue
            missing |= not self._hold(request, index, held)
        if not missing:
            self._waiting_since.pop(request.request_id, None)
            return request.request_id not in self._unavailable
        since = self._waiting_since.setdefault(request.request_id, time.monotonic())
        if time.monotonic() - since > self._patience:
            self._give_up(request.request_id, f"an embedding did not come within {self._patience:g} s")
        return False

    def _hold(self, request: "Request", index: int, held: set[str]) -> bool:
        key, rows = request.mm_features[index].identifier, request.get_num_encoder_embeds(index)
        try:
            if not self._holder.hold(key):
                return False
            held.add(key)
            found = read_header(self._holder.path(key)).rows
        except (errors.DvdError, OSError) as error:
            self._give_up(request.request_id, str(error))
            return False
        if found != rows:  # vLLM itself would take it and answer wrongly
            self._give_up(request.request_id, f"embedding {key[:12]} has {found} rows, the request says {rows}")
        return True

    def _give_up(self, request_id: str, why: str) -> None:
        log.warning("request %s fails: %s", request_id, why)
        self._unavailable.add(request_id)

    def has_cache_item(self, identifier: str) -> bool:
        return self._holder.held(identifier)

    def update_state_after_alloc(self, request: "Request", index: int) -> None:
        key = request.mm_features[index].identifier
        if key not in self._loads:
            self._loads[key] = str(self._holder.path(key))
            self._holder.hold(key)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> Loads:
        """One for each step. When a step is built, the one that is `max_concurrent_batches` before it is over."""
        loads, self._loads = Loads(self._loads), {}
        self._under_way.append(list(loads.files))
        while len(self._under_way) > self._at_once:
            for key in self._under_way.popleft():
                self._holder.release(key)
        return loads

    def has_pending_push_work(self) -> bool:
        """Whether vLLM must go on with empty steps: those that are idle would never let go of what the last one loaded."""
        return any(self._under_way)

    def take_unavailable_requests(self) -> set[str]:
        taken, self._unavailable = self._unavailable, set()
        return taken

    def request_finished(self, request: "Request") -> tuple[bool, dict[str, Any] | None]:
        for key in self._held.pop(request.request_id, set()):
            self._holder.release(key)
        self._waiting_since.pop(request.request_id, None)
        self._unavailable.discard(request.request_id)
        return False, None

    # In a worker.

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **_kwargs: Any) -> None:
        loads = self._get_connector_metadata()
        assert isinstance(loads, Loads)
        for key, path in loads.files.items():
            if key not in encoder_cache:
                encoder_cache[key] = load(Path(path))

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **_kwargs: Any) -> None:
        raise RuntimeError("a language worker encodes nothing")


def load(path: Path) -> torch.Tensor:
    """The embedding `[rows, width]` of a file, on the device of this process."""
    header, mapped = map_embedding(path)
    values = torch.frombuffer(mapped, dtype=getattr(torch, header.dtype), offset=HEADER_SIZE, count=header.rows * header.width)
    values = values.view(header.rows, header.width)
    return values if current_platform.is_cpu() else values.to(current_platform.device_type, non_blocking=True)

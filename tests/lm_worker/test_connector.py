"""The connector in both of its roles, on real files, without an engine."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole

from common.embedding import Header
from lm_worker.connector import EmbeddingFiles, SharedMemoryConnector
from lm_worker.shared_memory import create_folder
from lm_worker.store import Store

ROWS, WIDTH, WAIT_SECONDS = 4, 8, 0.2


@pytest.fixture
def store(tmp_path: Path) -> Store:
    create_folder(tmp_path / "store")
    return Store(tmp_path / "store", budget=1 << 20, lease=0)


def connector(store: Store, role: ECConnectorRole, max_concurrent_steps: int = 1) -> SharedMemoryConnector:
    extra = {"folder": str(store.folder), "wait": WAIT_SECONDS}
    transfer = SimpleNamespace(is_ec_producer=False, is_ec_consumer=True, get_from_extra_config=extra.get)
    return SharedMemoryConnector(
        SimpleNamespace(ec_transfer_config=transfer, max_concurrent_batches=max_concurrent_steps), role
    )


@pytest.fixture
def scheduler(store: Store) -> SharedMemoryConnector:
    return connector(store, ECConnectorRole.SCHEDULER)


def put(store: Store, key: str, values: torch.Tensor) -> None:
    with store.writing(Header(key, "f" * 64, "float32", *values.shape)) as incoming:
        incoming.add(values.numpy().tobytes())


def request(name: str, *keys: str, rows: int = ROWS) -> Any:
    """A request as vLLM's scheduler sees it: one image per key, two tokens between images."""
    span = rows + 2
    features = [
        SimpleNamespace(identifier=key, mm_position=SimpleNamespace(offset=i * span, length=rows)) for i, key in enumerate(keys)
    ]
    return SimpleNamespace(request_id=name, mm_features=features, get_num_encoder_embeds=lambda _index: rows)


def test_a_request_waits_until_all_its_embeddings_have_arrived(store: Store, scheduler: SharedMemoryConnector) -> None:
    image_request = request("r", "a", "b")
    put(store, "a", torch.ones(ROWS, WIDTH))
    assert not scheduler.ensure_cache_available(image_request, 0)
    put(store, "b", torch.ones(ROWS, WIDTH))
    assert scheduler.ensure_cache_available(image_request, 0)
    assert scheduler.has_cache_item("a")
    assert scheduler.has_cache_item("b")
    assert scheduler.take_unavailable_requests() == set()


def test_a_request_does_not_wait_for_images_in_the_kv_cache(scheduler: SharedMemoryConnector) -> None:
    image_request = request("r", "a")
    assert not scheduler.ensure_cache_available(image_request, ROWS - 1), "the last token of the image is still to be computed"
    assert scheduler.ensure_cache_available(image_request, ROWS)


def test_a_request_whose_embedding_does_not_arrive_fails(scheduler: SharedMemoryConnector) -> None:
    image_request = request("r", "a")
    assert not scheduler.ensure_cache_available(image_request, 0)
    assert scheduler.take_unavailable_requests() == set()
    time.sleep(WAIT_SECONDS * 1.5)
    assert not scheduler.ensure_cache_available(image_request, 0)
    assert scheduler.take_unavailable_requests() == {"r"}


@pytest.mark.parametrize("rows", [ROWS - 1, ROWS + 1])
def test_an_embedding_with_wrong_rows_fails_the_request(store: Store, scheduler: SharedMemoryConnector, rows: int) -> None:
    put(store, "a", torch.ones(ROWS, WIDTH))
    assert not scheduler.ensure_cache_available(request("r", "a", rows=rows), 0)
    assert scheduler.take_unavailable_requests() == {"r"}


def test_a_key_that_is_no_file_name_fails_the_request(scheduler: SharedMemoryConnector) -> None:
    assert not scheduler.ensure_cache_available(request("r", "../a"), 0)
    assert scheduler.take_unavailable_requests() == {"r"}


def test_an_embedding_is_pinned_while_a_request_lives(store: Store, scheduler: SharedMemoryConnector) -> None:
    put(store, "a", torch.ones(ROWS, WIDTH))
    first, second = request("1", "a"), request("2", "a", "a")
    assert scheduler.ensure_cache_available(first, 0)
    assert scheduler.ensure_cache_available(second, 0)
    scheduler.request_finished(first)
    assert scheduler.has_cache_item("a")
    scheduler.request_finished(second)
    assert not scheduler.has_cache_item("a")
    assert not list((store.folder / ".pinned").iterdir())


def test_a_worker_maps_a_pinned_embedding_after_its_eviction(store: Store, scheduler: SharedMemoryConnector) -> None:
    values = torch.arange(ROWS * WIDTH, dtype=torch.float32).view(ROWS, WIDTH)
    put(store, "a", values)
    image_request = request("r", "a")
    assert scheduler.ensure_cache_available(image_request, 0)
    scheduler.update_state_after_alloc(image_request, 0)
    (store.folder / "a").unlink()  # evicted
    files = scheduler.build_connector_meta(None)
    assert scheduler.build_connector_meta(None) == EmbeddingFiles({})

    worker, cache = connector(store, ECConnectorRole.WORKER), dict[str, torch.Tensor]()
    worker.bind_connector_metadata(files)
    worker.start_load_caches(cache)
    scheduler.request_finished(image_request)
    assert torch.equal(cache["a"], values)


@pytest.mark.parametrize("max_concurrent_steps", [1, 2, 3])
def test_embeddings_of_a_step_stay_pinned_until_it_ends(store: Store, max_concurrent_steps: int) -> None:
    """Its requests may end earlier: vLLM can handle an abort while the step is on its way to the workers."""
    scheduler = connector(store, ECConnectorRole.SCHEDULER, max_concurrent_steps)
    values = torch.arange(ROWS * WIDTH, dtype=torch.float32).view(ROWS, WIDTH)
    put(store, "a", values)
    first, second = request("r", "a"), request("s", "a")
    for each in (first, second):
        assert scheduler.ensure_cache_available(each, 0)
        scheduler.update_state_after_alloc(each, 0)
    files = scheduler.build_connector_meta(None)
    scheduler.request_finished(first)
    scheduler.request_finished(second)
    for _ in range(max_concurrent_steps - 1):  # steps that are built while the first one runs
        scheduler.build_connector_meta(None)
    worker, cache = connector(store, ECConnectorRole.WORKER, max_concurrent_steps), dict[str, torch.Tensor]()
    worker.bind_connector_metadata(files)
    worker.start_load_caches(cache)
    assert torch.equal(cache["a"], values)
    assert scheduler.has_pending_push_work(), "an idle engine would never unpin it"
    scheduler.build_connector_meta(None)
    assert not scheduler.has_pending_push_work()
    assert not list((store.folder / ".pinned").iterdir())

"""The connector in its two roles, on real files, without an engine."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole

from common.embedding import Header
from lm_worker.connector import Loads, SharedMemoryConnector
from lm_worker.store import Store, create_folder

ROWS, WIDTH, PATIENCE = 4, 8, 0.2


@pytest.fixture
def store(tmp_path: Path) -> Store:
    create_folder(tmp_path / "store")
    return Store(tmp_path / "store", budget=1 << 20, lease=0)


def connector(store: Store, role: ECConnectorRole, at_once: int = 1) -> SharedMemoryConnector:
    extra = {"folder": str(store.folder), "wait": PATIENCE}
    transfer = SimpleNamespace(is_ec_producer=False, is_ec_consumer=True, get_from_extra_config=extra.get)
    return SharedMemoryConnector(SimpleNamespace(ec_transfer_config=transfer, max_concurrent_batches=at_once), role)


@pytest.fixture
def scheduler(store: Store) -> SharedMemoryConnector:
    return connector(store, ECConnectorRole.SCHEDULER)


def put(store: Store, key: str, values: torch.Tensor) -> None:
    with store.writing(Header(key, "f" * 64, "float32", *values.shape)) as incoming:
        incoming.add(values.numpy().tobytes())


def request(name: str, *keys: str, rows: int = ROWS) -> Any:
    """As vLLM's scheduler has it: one image after the other, two tokens between them."""
    span = rows + 2
    features = [
        SimpleNamespace(identifier=key, mm_position=SimpleNamespace(offset=i * span, length=rows)) for i, key in enumerate(keys)
    ]
    return SimpleNamespace(request_id=name, mm_features=features, get_num_encoder_embeds=lambda _index: rows)


def test_a_request_waits_until_all_its_embeddings_are_there(store: Store, scheduler: SharedMemoryConnector) -> None:
    asked = request("r", "a", "b")
    put(store, "a", torch.ones(ROWS, WIDTH))
    assert not scheduler.ensure_cache_available(asked, 0)
    put(store, "b", torch.ones(ROWS, WIDTH))
    assert scheduler.ensure_cache_available(asked, 0)
    assert scheduler.has_cache_item("a")
    assert scheduler.has_cache_item("b")
    assert scheduler.take_unavailable_requests() == set()


def test_what_the_kv_cache_covers_is_not_waited_for(scheduler: SharedMemoryConnector) -> None:
    asked = request("r", "a")
    assert not scheduler.ensure_cache_available(asked, ROWS - 1), "the last token of the image is still to be computed"
    assert scheduler.ensure_cache_available(asked, ROWS)


def test_a_request_whose_embedding_does_not_come_fails(scheduler: SharedMemoryConnector) -> None:
    asked = request("r", "a")
    assert not scheduler.ensure_cache_available(asked, 0)
    assert scheduler.take_unavailable_requests() == set()
    time.sleep(PATIENCE * 1.5)
    assert not scheduler.ensure_cache_available(asked, 0)
    assert scheduler.take_unavailable_requests() == {"r"}


@pytest.mark.parametrize("rows", [ROWS - 1, ROWS + 1])
def test_an_embedding_of_other_length_fails_the_request(store: Store, scheduler: SharedMemoryConnector, rows: int) -> None:
    put(store, "a", torch.ones(ROWS, WIDTH))
    assert not scheduler.ensure_cache_available(request("r", "a", rows=rows), 0)
    assert scheduler.take_unavailable_requests() == {"r"}


def test_a_key_that_is_no_file_name_fails_the_request(scheduler: SharedMemoryConnector) -> None:
    assert not scheduler.ensure_cache_available(request("r", "../a"), 0)
    assert scheduler.take_unavailable_requests() == {"r"}


def test_an_embedding_is_held_while_a_request_lives(store: Store, scheduler: SharedMemoryConnector) -> None:
    put(store, "a", torch.ones(ROWS, WIDTH))
    first, second = request("1", "a"), request("2", "a", "a")
    assert scheduler.ensure_cache_available(first, 0)
    assert scheduler.ensure_cache_available(second, 0)
    scheduler.request_finished(first)
    assert scheduler.has_cache_item("a")
    scheduler.request_finished(second)
    assert not scheduler.has_cache_item("a")
    assert not list((store.folder / "held").iterdir())


def test_a_worker_maps_what_the_scheduler_held(store: Store, scheduler: SharedMemoryConnector) -> None:
    values = torch.arange(ROWS * WIDTH, dtype=torch.float32).view(ROWS, WIDTH)
    put(store, "a", values)
    asked = request("r", "a")
    assert scheduler.ensure_cache_available(asked, 0)
    scheduler.update_state_after_alloc(asked, 0)
    (store.folder / "a").unlink()  # evicted in between
    loads = scheduler.build_connector_meta(None)
    assert scheduler.build_connector_meta(None) == Loads({})

    worker, cache = connector(store, ECConnectorRole.WORKER), dict[str, torch.Tensor]()
    worker.bind_connector_metadata(loads)
    worker.start_load_caches(cache)
    scheduler.request_finished(asked)
    assert torch.equal(cache["a"], values)


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_what_a_step_loads_is_held_until_the_step_is_over_though_its_request_has_gone(store: Store, at_once: int) -> None:
    """As vLLM has it where its workers are processes: an abort is heard while the step is on its way to them."""
    scheduler = connector(store, ECConnectorRole.SCHEDULER, at_once)
    values = torch.arange(ROWS * WIDTH, dtype=torch.float32).view(ROWS, WIDTH)
    put(store, "a", values)
    asked, same = request("r", "a"), request("s", "a")
    for one in (asked, same):
        assert scheduler.ensure_cache_available(one, 0)
        scheduler.update_state_after_alloc(one, 0)
    loads = scheduler.build_connector_meta(None)
    scheduler.request_finished(asked)
    scheduler.request_finished(same)
    for _ in range(at_once - 1):  # those that are built while it is under way
        scheduler.build_connector_meta(None)
    worker, cache = connector(store, ECConnectorRole.WORKER, at_once), dict[str, torch.Tensor]()
    worker.bind_connector_metadata(loads)
    worker.start_load_caches(cache)
    assert torch.equal(cache["a"], values)
    assert scheduler.has_pending_push_work(), "an engine with nothing to do would hold it for ever"
    scheduler.build_connector_meta(None)
    assert not scheduler.has_pending_push_work()
    assert not list((store.folder / "held").iterdir())

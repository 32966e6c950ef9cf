"""The connector in both of its roles, on real files, without an engine."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole

from common.embedding import Header
from lm_worker.connector import EmbeddingFiles, SharedMemoryConnector, load_embedding
from lm_worker.encoder_cache import PinnedEncoderCacheManager
from lm_worker.shared_memory import WAITING, create_folder
from lm_worker.store import Store

ROWS, WIDTH, WAIT_SECONDS = 4, 8, 0.2
NOTHING_SCHEDULED, SOMETHING_SCHEDULED = (
    SimpleNamespace(total_num_scheduled_tokens=0),
    SimpleNamespace(total_num_scheduled_tokens=9),
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    create_folder(tmp_path / "store")
    return Store(tmp_path / "store", budget=1 << 20, lease=0)


def vllm_config(
    store: Store, max_concurrent_steps: int = 1, partial_share: float = 0.0, dtype: torch.dtype = torch.float32
) -> Any:
    """What the connector reads of an engine with 1,000 tokens of KV cache and eight running requests."""
    extra = {"folder": str(store.folder), "wait": WAIT_SECONDS, "partial_share": partial_share}
    return SimpleNamespace(
        ec_transfer_config=SimpleNamespace(is_ec_producer=False, is_ec_consumer=True, get_from_extra_config=extra.get),
        max_concurrent_batches=max_concurrent_steps,
        scheduler_config=SimpleNamespace(enable_chunked_prefill=True, max_num_seqs=8, max_num_active_seqs=None),
        model_config=SimpleNamespace(is_hybrid=False, dtype=dtype),
        cache_config=SimpleNamespace(num_gpu_blocks=100, block_size=10),
        num_prefill_lookahead_tokens=0,
    )


def connector(
    store: Store, role: ECConnectorRole, max_concurrent_steps: int = 1, partial_share: float = 0.0
) -> SharedMemoryConnector:
    return SharedMemoryConnector(vllm_config(store, max_concurrent_steps, partial_share), role)


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
    files = scheduler.build_connector_meta(SOMETHING_SCHEDULED)
    assert scheduler.build_connector_meta(SOMETHING_SCHEDULED) == EmbeddingFiles({})

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
    files = scheduler.build_connector_meta(SOMETHING_SCHEDULED)
    scheduler.request_finished(first)
    scheduler.request_finished(second)
    for _ in range(max_concurrent_steps - 1):  # steps that are built while the first one runs
        scheduler.build_connector_meta(SOMETHING_SCHEDULED)
    worker, cache = connector(store, ECConnectorRole.WORKER, max_concurrent_steps), dict[str, torch.Tensor]()
    worker.bind_connector_metadata(files)
    worker.start_load_caches(cache)
    assert torch.equal(cache["a"], values)
    assert scheduler.has_pending_push_work(), "an idle engine would never unpin it"
    scheduler.build_connector_meta(SOMETHING_SCHEDULED)
    assert not scheduler.has_pending_push_work()
    assert not list((store.folder / ".pinned").iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_a_narrow_embedding_is_widened_to_the_dtype_of_the_model(store: Store, name: str, dtype: torch.dtype) -> None:
    """All codes that a value has, with scales that no dtype can represent exactly."""
    code_dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[name]
    undefined = {0x7F, 0xFF} if name == "fp8" else {0x80}
    codes = torch.tensor([[code for code in range(256) if code not in undefined]] * 5, dtype=torch.uint8).view(code_dtype)
    scales = torch.tensor([0.0, 1 / 3, 1e-7, 3e-30, 100.7])
    with store.writing(Header("a", "f" * 64, name, *codes.shape)) as incoming:
        incoming.add(scales.numpy().tobytes() + codes.view(torch.uint8).numpy().tobytes())
    worker, cache = SharedMemoryConnector(vllm_config(store, dtype=dtype), ECConnectorRole.WORKER), dict[str, torch.Tensor]()
    worker.bind_connector_metadata(EmbeddingFiles({"a": str(store.folder / "a")}))
    worker.start_load_caches(cache)
    expected = codes.to(torch.float32).mul(scales[:, None]).to(dtype)
    assert cache["a"].dtype == dtype
    assert torch.equal(cache["a"], expected)
    assert torch.isfinite(cache["a"]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_other_embeddings_are_mapped_unchanged(store: Store, dtype: str) -> None:
    values = torch.randn(ROWS, WIDTH).to(getattr(torch, dtype))
    with store.writing(Header("a", "f" * 64, dtype, ROWS, WIDTH)) as incoming:
        incoming.add(values.view(torch.uint8).numpy().tobytes())
    loaded = load_embedding(store.folder / "a", torch.float32)
    assert loaded.dtype == values.dtype
    assert torch.equal(loaded, values)


def test_a_request_goes_on_up_to_its_first_missing_embedding(store: Store) -> None:
    scheduler = connector(store, ECConnectorRole.SCHEDULER, partial_share=0.5)
    image_request = request("r", "a", "b", "c", rows=100)
    assert not scheduler.ensure_cache_available(image_request, 0), "nothing is in front of the first image"
    put(store, "a", torch.ones(100, WIDTH))
    assert scheduler.ensure_cache_available(image_request, 0)
    assert [scheduler.has_cache_item(key) for key in "abc"] == [True, False, False]
    assert not scheduler.ensure_cache_available(image_request, 102), "it has come to image b"
    put(store, "c", torch.ones(100, WIDTH))
    assert not scheduler.ensure_cache_available(image_request, 102)
    put(store, "b", torch.ones(100, WIDTH))
    assert scheduler.ensure_cache_available(image_request, 102)


def test_a_prefix_that_ends_within_a_missing_image_does_not_help(store: Store) -> None:
    scheduler = connector(store, ECConnectorRole.SCHEDULER, partial_share=0.5)
    image_request = request("r", "a", "b", rows=100)
    put(store, "b", torch.ones(100, WIDTH))
    assert not scheduler.ensure_cache_available(image_request, 90)


def test_the_encoder_cache_admits_only_what_is_pinned(store: Store) -> None:
    config = vllm_config(store, partial_share=0.5)
    scheduler = SharedMemoryConnector(config, ECConnectorRole.SCHEDULER)
    manager = PinnedEncoderCacheManager.create_manager(cache_size=1000, vllm_config=config)
    image_request = request("r", "a", "b", rows=100)
    put(store, "a", torch.ones(100, WIDTH))
    scheduler.ensure_cache_available(image_request, 0)
    assert [manager.can_allocate(image_request, index, 1000, 0) for index in (0, 1)] == [True, False]
    assert not manager.can_allocate(image_request, 0, 1000, 950), "vLLM's own bound holds too"


def test_time_does_not_count_while_an_embedding_is_expected(store: Store, scheduler: SharedMemoryConnector) -> None:
    image_request = request("r", "a")
    assert store.rows("a", expect_seconds=60) == 0
    for _ in range(2):
        assert not scheduler.ensure_cache_available(image_request, 0)
        time.sleep(WAIT_SECONDS * 1.5)
    assert scheduler.take_unavailable_requests() == set()
    put(store, "a", torch.ones(ROWS, WIDTH))
    (store.folder / "a").unlink()  # evicted
    for _ in range(2):
        assert not scheduler.ensure_cache_available(image_request, 0), "it was evicted before it was pinned"
        time.sleep(WAIT_SECONDS * 1.5)
    assert scheduler.take_unavailable_requests() == {"r"}


def test_an_engine_that_only_waits_for_what_is_expected_says_so(store: Store, scheduler: SharedMemoryConnector) -> None:
    image_request = request("r", "a")
    scheduler.ensure_cache_available(image_request, 0)
    scheduler.build_connector_meta(NOTHING_SCHEDULED)
    store.rows("a", expect_seconds=60)
    scheduler.ensure_cache_available(image_request, 0)
    scheduler.build_connector_meta(SOMETHING_SCHEDULED)
    assert not (store.folder / WAITING).exists()
    scheduler.ensure_cache_available(image_request, 0)
    scheduler.build_connector_meta(NOTHING_SCHEDULED)
    assert (store.folder / WAITING).exists()

"""Workers that cannot be combined: different checkpoints, and dtypes that are not delivered."""

from pathlib import Path
from typing import Any

import pytest

from protos import embeddings_pb2 as pb
from server.workers.compatibility import find_mismatch
from tests.server.fakes.vision_worker import checkpoint_description
from tests.server.fakes.waiting import wait_until
from tests.server.workers.helpers import count_up, start_named_pools, start_pools


def test_no_workers_have_no_mismatch() -> None:
    assert find_mismatch([]) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": "e" * 64}, {"width": 5}, {"tile_size": 224}, {"tokens_per_tile": 64}, {"relative_threshold": 0.5},
        {"compressed_tokens_per_tile": 0}, {"absolute_threshold": 0.5}, {"min_tiles": 2}, {"max_tiles": 6},
        {"thumbnail": False},
    ],
)  # fmt: skip
async def test_a_mismatch_names_the_field_and_both_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    async with start_pools(tmp_path, monkeypatch) as (workers, vision, language):
        assert workers.mismatch() is None
        vision.checkpoint = checkpoint_description(**changes)
        await workers.probe()
        mismatch = workers.mismatch()
        assert mismatch is not None
        ((name, value),) = changes.items()
        words = {name, str(value), str(getattr(checkpoint_description(), name))}
        assert words <= set(mismatch.summary.replace(";", "").split())
        assert words <= set(mismatch.details.replace(";", "").split())
        for kind, address in (("vision", vision.address), ("language", language.sink.address)):
            assert f"({kind} worker {address})" in mismatch.details
            assert address not in mismatch.summary, "callers do not learn addresses"


async def test_a_mismatch_names_the_workers_of_each_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with start_named_pools(tmp_path, monkeypatch, vision_count=7) as (workers, names):
        names.visions[3].checkpoint = checkpoint_description(width=5)
        await names.set_visions(*range(7))
        await wait_until(lambda: count_up(workers) == (7, 1), "all workers are up")
        assert workers.mismatch() is None, "six of seven can serve"
        (warning,) = workers.warnings()
        others = ", ".join(f"vision worker {names.visions[i].address}" for i in (0, 1, 2, 4))
        assert f"width 4 ({others} and 3 more) and 5 (vision worker {names.visions[3].address});" in warning


@pytest.mark.parametrize(("number", "is_mismatch"), [(9, True), (0, True), (1, False)])
async def test_a_dtype_that_vision_workers_do_not_deliver_is_a_mismatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_mismatch: bool
) -> None:
    async with start_pools(tmp_path, monkeypatch) as (workers, _, language):
        language.sink.dtype = number
        await workers.probe()
        mismatch = workers.mismatch()
        assert bool(mismatch) == is_mismatch
        if mismatch:
            assert f"dtype number {number}, but this gateway knows bfloat16, float16, float32, int8, fp8" in mismatch.summary
            assert mismatch.details.startswith(f"language worker {language.sink.address} takes embeddings in")


@pytest.mark.parametrize(("dtype", "name"), [(pb.INT8, "int8"), (pb.FP8, "fp8")])
async def test_a_vision_worker_that_does_not_deliver_narrow_embeddings_is_a_mismatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: int, name: str
) -> None:
    async with start_pools(tmp_path, monkeypatch) as (workers, vision, language):
        language.sink.dtype = dtype
        await workers.probe()
        mismatch = workers.mismatch()
        assert mismatch is not None, "a vision worker of an older version names no dtypes"
        assert f"takes embeddings in {name} (--embedding-dtype), but a vision worker delivers bfloat16, float16, float32;" in (
            mismatch.summary
        )
        for address in (vision.address, language.sink.address):
            assert address in mismatch.details
            assert address not in mismatch.summary, "callers do not learn addresses"
        vision.description = {"embedding_dtypes": [pb.FLOAT32, dtype, 9]}  # 9: of a newer version
        await workers.probe()
        assert workers.mismatch() is None
        assert workers.unpaired() == []
        language.sink.dtype = pb.BFLOAT16
        await workers.probe()
        assert (
            f"takes embeddings in bfloat16 (--embedding-dtype), but a vision worker delivers float32, {name};"
            in (workers.mismatch() or pytest.fail("no mismatch")).summary
        )

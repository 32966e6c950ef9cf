"""Payloads of images that are projected together: which share memory, and whose bytes they are."""

import pytest
import torch

from tests.vision_worker import golden
from vision_worker import projector
from vision_worker.models.recorded import recorded_sizes
from vision_worker.models.vir import Fixed
from vision_worker.pinned_memory import PinnedMemory
from vision_worker.projector import CompleteGroup, Projector
from vision_worker.quantization import EMBEDDING_DTYPES


@pytest.mark.parametrize("dtype", sorted(EMBEDDING_DTYPES))
@pytest.mark.parametrize("shared_bytes", [1, 200_000, 16 << 20])
def test_payloads_of_groups_together_are_those_of_each_alone(
    dtype: str, shared_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projector, "_SHARED_BYTES", shared_bytes)
    features = golden.features("flash-qwen3", "hd_1920x1080.jpg", torch.float32)
    sizes = [[2, 1], [1], [1, 1, 1]]
    groups, first = list[CompleteGroup](), 0
    for number, tiles in enumerate(sizes):
        parts = [features[first : first + 1], features[first + 1 : first + sum(tiles)]]
        first += sum(tiles)
        index = list(range(sum(tiles)))
        groups.append(CompleteGroup(parts, index, Fixed(number == 1), EMBEDDING_DTYPES[dtype], tiles))
    projecting = Projector(golden.encoder("flash-qwen3"))
    together = projecting.project(groups)
    for group, tiles, result in zip(groups, sizes, together, strict=True):
        alone = projecting.project([group])[0]
        assert [image.rows for image in result.images] == [image.rows for image in alone.images]
        assert [len(image.compressed) for image in result.images] == tiles
        for image, expected in zip(result.images, alone.images, strict=True):
            assert len(image.data) == len(expected.data)
            if dtype == "float32":
                actual, wanted = (torch.frombuffer(bytearray(each.data), dtype=torch.float32) for each in (image, expected))
                assert golden.relative_error(actual, wanted) < 1e-5


def test_groups_of_different_dtypes_are_projected_together() -> None:
    features = golden.features("flash-qwen3", "square.png", torch.float32)[:1]
    groups = [
        CompleteGroup([features], [0], Fixed(False), EMBEDDING_DTYPES[name], [1]) for name in ("int8", "float32", "bfloat16")
    ]
    together = Projector(golden.encoder("flash-qwen3")).project(groups)
    width = golden.encoder("flash-qwen3").checkpoint.description.width
    assert [len(group.images[0].data) for group in together] == [256 * (width + 4), 256 * width * 4, 256 * width * 2]


def test_where_nothing_can_be_pinned_ordinary_memory_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def refuse(*arguments: int, pin_memory: bool = False, **more: torch.dtype) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("cannot pin memory")
        return empty(*arguments, **more)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "empty", refuse)
    memory = PinnedMemory(max_bytes=1 << 20)
    for _ in range(3):
        assert memory.allocate(1 << 20).shape == (1 << 20,)
    assert memory._total == 0


@pytest.mark.parametrize("largest", [1, 2, 5, 32, 33, 100])
def test_recorded_batches_have_little_padding(largest: int) -> None:
    sizes = recorded_sizes(largest)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == largest
    for tiles in range(1, largest + 1):
        size = next(size for size in sizes if size >= tiles)
        assert (size - tiles) / size <= 0.2

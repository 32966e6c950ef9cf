"""On a GPU, embeddings are those of the official implementation too. Skipped where torch finds none."""

import asyncio
from dataclasses import replace
from itertools import chain

import pytest
import torch

from tests.vision_worker import golden
from vision_worker import quantization
from vision_worker.batcher import Batcher
from vision_worker.encoder import Placement, Stager
from vision_worker.models import vir
from vision_worker.models.internvl import InternVL, load
from vision_worker.pinned_memory import PinnedMemory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")

CASES = [pytest.param(case, id=case.id) for case in golden.cases(*golden.NAMES)]


def load_on_gpu(name: str, dtype: torch.dtype = torch.float32) -> InternVL:
    return load(golden.encoder(name).checkpoint, Placement(torch.device("cuda"), dtype))


def embed(encoder: InternVL, case: golden.Case) -> tuple[list[bool], list[torch.Tensor]]:
    """Return routes and embeddings of a case, computed on the GPU in batches of one image."""
    images = [golden.tiles(encoder, file).pixels for file in case.fields["images"]]
    features = torch.cat([encoder.forward(encoder.stage(list(pixels))) for pixels in images])
    policy = vir.select_policy(0, encoder.checkpoint.description.thresholds)
    result = golden.project(encoder, features, range(len(features)), policy)
    return result.compressed, [tokens.cpu() for tokens in golden.split_by_image(case, result)]


@pytest.mark.parametrize("case", CASES)
def test_routes_and_embeddings_in_float32(case: golden.Case) -> None:
    compressed, embeddings = embed(load_on_gpu(case.checkpoint), case)
    assert compressed == list(chain(*case.fields["compressed"]))
    for i, embedding in enumerate(embeddings):
        expected = case.sampled_embedding(i)
        assert expected is None or golden.relative_error(embedding[:: golden.SAMPLE_STRIDE], expected) < 1e-5


@pytest.mark.parametrize("name", golden.NAMES)
def test_bfloat16_agrees_with_float32(name: str) -> None:
    pixels = list(golden.tiles(golden.encoder(name), "wide_1300x800.jpg").pixels)
    exact, rounded = (load_on_gpu(name, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert golden.relative_error(rounded.forward(rounded.stage(pixels)), exact.forward(exact.stage(pixels))) < 2e-2


@pytest.mark.filterwarnings("default:TensorFloat32")
@pytest.mark.parametrize("name", golden.NAMES)
def test_a_compiled_tower_agrees_with_the_plain_one_at_every_batch_size(name: str) -> None:
    torch.compiler.reset()
    pixels = list(golden.tiles(golden.encoder(name), "wide_1300x800.jpg").pixels)
    plain = load_on_gpu(name)
    compiled = load(plain.checkpoint, replace(plain.placement, is_compiled=True, record_for=4))
    for size in (*compiled.warmup_batch_sizes(4), 3):
        staged = plain.stage(pixels[:size])
        torch.testing.assert_close(compiled.forward(staged), plain.forward(staged), rtol=1e-4, atol=1e-4)


def test_features_of_a_tile_hardly_depend_on_its_batch() -> None:
    encoder = load_on_gpu("flash-qwen3")
    pixels = list(golden.tiles(encoder, "wide_1300x800.jpg").pixels)
    together = encoder.forward(encoder.stage(pixels))
    for i, tile in enumerate(pixels):
        torch.testing.assert_close(encoder.forward(encoder.stage([tile]))[0], together[i], rtol=1e-4, atol=1e-4)


def test_tiles_are_staged_unchanged() -> None:
    pixels = list(golden.tiles(golden.encoder("flash-qwen3"), "wide_1300x800.jpg").pixels)
    staged = Stager(torch.device("cuda")).stage(pixels)
    assert staged.is_cuda
    assert torch.equal(staged.cpu(), torch.stack([torch.tensor(tile) for tile in pixels]))


@pytest.mark.parametrize("dtype", quantization.NARROW_DTYPES)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_embeddings_have_the_same_bytes_as_on_a_cpu(dtype: str, source: torch.dtype) -> None:
    tokens = torch.randn(1024, 512, generator=torch.Generator().manual_seed(0)).to(source)
    tokens[0], tokens[1] = 0, tokens[1] * 1e-7
    narrow = quantization.NARROW_DTYPES[dtype]
    on_cpu, on_gpu = quantization.convert(tokens, narrow), quantization.convert(tokens.cuda(), narrow)
    for expected, actual in zip(on_cpu, on_gpu, strict=True):
        assert torch.equal(actual.cpu().view(torch.uint8), expected.view(torch.uint8))


def test_a_recorded_tower_agrees_with_the_plain_one_at_every_batch_size() -> None:
    plain = load_on_gpu("flash-qwen3")
    recorded = load(plain.checkpoint, replace(plain.placement, record_for=9))
    pixels = [tile for name in ("wide_1300x800.jpg", "hd_1920x1080.jpg") for tile in golden.tiles(plain, name).pixels]
    for size in (*recorded.warmup_batch_sizes(9), 9, 1, 3, 8):
        staged = plain.stage(pixels[-size:])
        torch.testing.assert_close(recorded.forward(staged), plain.forward(staged), rtol=1e-4, atol=1e-4)


async def test_many_calls_at_once_get_the_embeddings_of_a_cpu() -> None:
    """Batches overlap, are padded, and mix groups; payloads are in memory that is used again."""
    on_cpu = golden.encoder("flash-qwen3")
    on_gpu = load(on_cpu.checkpoint, Placement(torch.device("cuda"), torch.float32, record_for=8))
    images = [golden.tiles(on_cpu, name) for name in ("wide_1300x800.jpg", "square.png", "hd_1920x1080.jpg", "tiny_33x21.png")]
    policy = vir.select_policy(0, on_cpu.checkpoint.description.thresholds)
    async with Batcher(on_cpu, 8) as batcher:
        expected = [(await batcher.encode([image], policy, torch.float32)).images[0] for image in images]
    async with Batcher(on_gpu, 8) as batcher:
        await batcher.warm_up()
        for _ in range(5):
            groups = await asyncio.gather(*(batcher.encode([image], policy, torch.float32) for image in images * 20))
            for group, wanted in zip(groups, expected * 20, strict=True):
                actual = group.images[0]
                assert (actual.rows, actual.compressed) == (wanted.rows, wanted.compressed)
                tensors = [torch.frombuffer(bytearray(each.data), dtype=torch.float32) for each in (actual, wanted)]
                assert golden.relative_error(*tensors) < 1e-5


def test_ordinary_memory_is_used_once_enough_is_pinned() -> None:
    memory = PinnedMemory(max_bytes=3 << 20)  # for three buffers
    buffers = [memory.allocate(1 << 20) for _ in range(4)]
    assert [buffer.is_pinned() for buffer in buffers] == [True, True, True, False]
    view = buffers.pop(0).numpy().data.cast("B")
    assert not memory.allocate(1 << 20).is_pinned(), "a view still uses the memory"
    del view
    assert memory.allocate(1 << 20).is_pinned()

"""Tiles/s of the towers at their published shapes: run as they are, as a CUDA graph, compiled, and compiled as a graph."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.gpu.kit import Kit, Measurement, Skipped
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.timing import measure_seconds, rate
from vision_worker.models.compiled import CompiledTower
from vision_worker.models.intern_vit import InternViT
from vision_worker.models.recorded import RecordedTower

REACHABLE_TFLOPS = {"NVIDIA H200": 790.0, "NVIDIA H100": 790.0}
"""Dense bf16 TFLOP/s that large matrix products of random values reach, by prefix of the card's name; data sheets say more."""
SHARE = "share of the reachable"
"""Name of the figure that `REACHABLE_TFLOPS` divides."""
_SECONDS_PER_MEASUREMENT = 3.0

Module = TypeVar("Module", bound=nn.Module)
TowerFunction = Callable[[Tensor], Tensor]
Variant = Callable[[InternViT, Tensor], TowerFunction]


def measurements(kit: Kit, shape: Shape, batches: tuple[int, ...]) -> Iterator[Measurement]:
    """Yield a measurement per batch size and variant; compilation, which takes longest, is measured last and once."""
    tower = functools.cache(functools.partial(random_tower, shape, kit.device))
    for tiles in batches:
        for name, variant, seconds in (("eager", _eager, 12), ("CUDA graph", _graph, 15)):
            yield _measurement(kit, shape, tower, tiles, name, variant, seconds)
    for name, variant, seconds in (("compiled", _compiled, 45), ("compiled, CUDA graph", _compiled_graph, 45)):
        yield _measurement(kit, shape, tower, batches[-1], name, variant, seconds)


def _measurement(
    kit: Kit, shape: Shape, tower: Callable[[], InternViT], tiles: int, name: str, variant: Variant, seconds: float
) -> Measurement:
    def measure() -> dict[str, Any]:
        pixels = torch.randn(tiles, 3, *2 * [shape.tower.image_size], device=kit.device, dtype=dtype_of(kit.device))
        with torch.inference_mode():
            run = variant(tower(), pixels)
            budget = 0.0 if kit.dry else _SECONDS_PER_MEASUREMENT
            figures = rate(tiles, measure_seconds(lambda: run(pixels), kit.device, budget))
        return {"tiles/s": figures["per second"], "spread": figures["spread"]} | _share(kit, shape, figures["per second"])

    return Measurement(f"tower {shape.name}, {name}, {tiles} tiles", seconds, measure)


def _share(kit: Kit, shape: Shape, tiles_per_second: float) -> dict[str, float]:
    """Return TFLOP/s and, for a card that is known, the share of what it can reach."""
    tflops = tiles_per_second * shape.flop_per_tile / 1e12
    name = kit.environment()["device"]
    reachable = next((value for prefix, value in REACHABLE_TFLOPS.items() if name.startswith(prefix)), None)
    return {"TFLOP/s": round(tflops, 2)} | ({SHARE: round(tflops / reachable, 3)} if reachable else {})


def dtype_of(device: torch.device) -> torch.dtype:
    """Return what a vision worker computes in: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def random_tower(shape: Shape, device: torch.device) -> InternViT:
    """Build a tower with random weights on the device."""
    dtype = dtype_of(device)
    with torch.device("meta"):
        tower = InternViT(shape.tower, shape.patches + 1).to(dtype)
    return randomize(tower.to_empty(device=device))


def randomize(module: Module) -> Module:
    """Give a module random weights that keep the scale of activations, as trained ones do, and return it for inference.

    Smaller activations would flatter the device: products of numbers near zero take less power, and so run faster.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return module.eval()


def _eager(tower: InternViT, pixels: Tensor) -> TowerFunction:
    del pixels
    return tower


def _graph(tower: InternViT, pixels: Tensor) -> TowerFunction:
    """Record one forward pass, and replay it on the same memory."""
    if not pixels.is_cuda:
        raise Skipped("a CPU has no CUDA graphs")
    tower(pixels)  # libraries create their handles outside of the recording
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        features: Tensor = tower(pixels)

    def replay(_: Tensor) -> Tensor:
        graph.replay()
        return features

    return replay


def _compiled(tower: InternViT, pixels: Tensor) -> TowerFunction:
    del pixels
    _reset_compiler()
    return CompiledTower(tower)


def _compiled_graph(tower: InternViT, pixels: Tensor) -> TowerFunction:
    """Run the tower as a vision worker with `--vision-compile` does."""
    if not pixels.is_cuda:
        raise Skipped("a CPU has no CUDA graphs")
    _reset_compiler()
    return RecordedTower(CompiledTower(tower), len(pixels))


def _reset_compiler() -> None:
    torch.compiler.reset()  # it compiles a function for eight shapes at most

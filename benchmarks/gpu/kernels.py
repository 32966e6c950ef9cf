"""Where a forward pass spends its time: its largest kernels by the profiler of torch."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.kit import Kit, Measurement
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.timing import synchronize
from benchmarks.gpu.towers import dtype_of, random_tower

_LARGEST = 10
_TILES = 32


def measurements(kit: Kit, shape: Shape) -> Iterator[Measurement]:
    """Yield one measurement."""
    yield Measurement(f"kernels of the tower {shape.name}", 20, lambda: _measure(kit, shape))


@torch.inference_mode()
def _measure(kit: Kit, shape: Shape) -> dict[str, Any]:
    tower = random_tower(shape, kit.device)
    pixels = torch.randn(1 if kit.dry else _TILES, 3, *2 * [shape.tower.image_size], device=kit.device)
    pixels = pixels.to(dtype_of(kit.device))
    tower(pixels)
    cuda = kit.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        tower(pixels)
        synchronize(kit.device)
    microseconds = {
        event.key: event.self_device_time_total if cuda else event.self_cpu_time_total for event in profiler.key_averages()
    }
    total = sum(microseconds.values())
    largest = sorted(microseconds.items(), key=lambda item: -item[1])[:_LARGEST]
    return {"ms": round(total / 1e3, 3), "share of time": {f"`{name[:100]}`": round(time / total, 4) for name, time in largest}}

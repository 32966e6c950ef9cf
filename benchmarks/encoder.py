"""Tiles/s of InternViT at its published shape with random weights: ours against transformers' eager tower and vLLM's.

All towers run in one process, on the same tiles, with the same dtype, one after another in each repeat. Only the tower is
measured, without image decoding and projector. `python -m benchmarks.gpu` has the larger tower and the share of a card's peak.
"""

import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.checkpoint import VISION
from benchmarks.costs import BATCH_TILES
from benchmarks.gpu.shapes import INTERN_VIT_300M, PUBLISHED
from benchmarks.gpu.timing import run_seconds
from benchmarks.gpu.towers import randomize
from benchmarks.options import Options
from benchmarks.result import Result, median_ratio
from common.layouts.base import Tower
from vision_worker.models import onednn
from vision_worker.models.compiled import CompiledTower
from vision_worker.models.intern_vit import InternViT

_VLLM_GROUP = "tcp://127.0.0.1:29511"

TowerFunction = Callable[[Tensor], Any]


SMALL_TOWER = replace(
    INTERN_VIT_300M, hidden_size=VISION["hidden_size"], intermediate_size=VISION["intermediate_size"],
    layers=VISION["num_hidden_layers"], heads=VISION["num_attention_heads"],
)  # fmt: skip
"""The tower of the checkpoint that other benchmarks serve."""


def run(options: Options) -> Result:
    """Measure tiles/s. The headline is ours over transformers' eager tower; the target is 1.1 on a CPU."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tiles = 32 if cuda else 2
    towers: dict[str, TowerFunction] = {
        "ours": _optimized_tower(INTERN_VIT_300M, device, dtype),
        "ours, compiled": CompiledTower(our_tower(INTERN_VIT_300M, device, dtype)),
        "transformers": _transformers_tower(device, dtype),
        "vllm": _vllm_tower(INTERN_VIT_300M, device, dtype),
    }
    rates = _measure_rates(towers, _pixels(tiles, device, dtype), options.repeats(5))
    ratio, spread = median_ratio(rates["ours"], rates["transformers"])
    figures = _figures(rates) | {
        "tiles in a batch": tiles, "device": device, "dtype": str(dtype),
        "TFLOP/s": round(statistics.median(rates["ours"]) * PUBLISHED[0].flop_per_tile / 1e12, 2),
    }  # fmt: skip
    if not cuda:
        figures["8 layers of 256, four tiles, one core"] = _small_tower_figures(options)
    return Result("encoder", ratio, 1.1, spread, figures)


def _small_tower_figures(options: Options) -> dict[str, Any]:
    """Measure the tower of the other benchmarks as they run it, against vLLM's."""
    torch.set_num_threads(1)
    towers: dict[str, TowerFunction] = {
        "ours": _optimized_tower(SMALL_TOWER, "cpu", torch.float32),
        "vllm": _vllm_tower(SMALL_TOWER, "cpu", torch.float32),
    }
    return _figures(_measure_rates(towers, _pixels(BATCH_TILES, "cpu", torch.float32), options.repeats(15)))


def _figures(rates: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "tiles/s": {name: round(statistics.median(repeats), 3) for name, repeats in rates.items()},
        "over vllm's": round(median_ratio(rates["ours"], rates["vllm"])[0], 3),
    }


def _pixels(tiles: int, device: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(tiles, 3, 448, 448, device=device, dtype=dtype)


def _measure_rates(towers: dict[str, TowerFunction], pixels: Tensor, repeats: int) -> dict[str, list[float]]:
    """Tiles/s of each tower in each repeat; towers take turns."""
    rates: dict[str, list[float]] = {name: [] for name in towers}
    for repeat in range(repeats + 1):
        for name, tower in towers.items():
            seconds = _forward_seconds(tower, pixels)
            if repeat:  # the first is the warm-up
                rates[name].append(len(pixels) / seconds)
    return rates


@torch.inference_mode()
def _forward_seconds(tower: TowerFunction, pixels: Tensor) -> float:
    return run_seconds(lambda: tower(pixels), pixels.device)


def _optimized_tower(shape: Tower, device: str, dtype: torch.dtype) -> nn.Module:
    """Return this project's tower as a vision worker runs it."""
    tower = our_tower(shape, device, dtype)
    if onednn.is_supported(torch.device(device), dtype):
        onednn.optimize(tower)
    return tower


def our_tower(tower: Tower, device: str, dtype: torch.dtype) -> InternViT:
    """Return this project's tower of a published shape, with random weights."""
    with torch.device(device):
        return randomize(InternViT(tower, 1025)).to(dtype)


def _transformers_tower(device: str, dtype: torch.dtype) -> nn.Module:
    from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
    from transformers.models.internvl.modeling_internvl import InternVLVisionModel

    config = InternVLVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=[448, 448],
        patch_size=[14, 14], attention_bias=True, use_qk_norm=False, norm_type="layer_norm", hidden_act="gelu",
    )  # fmt: skip
    config._attn_implementation = "eager"
    with torch.device(device):
        model: nn.Module = InternVLVisionModel(config)
        return randomize(model).to(dtype)


def _vllm_tower(tower: Tower, device: str, dtype: torch.dtype) -> nn.Module:
    """vLLM's tower in a process group of one: vLLM builds no layer without a group."""
    from transformers import PretrainedConfig
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.models.intern_vit import InternVisionModel

    config = PretrainedConfig(
        hidden_size=tower.hidden_size, intermediate_size=tower.intermediate_size, num_hidden_layers=tower.layers,
        num_attention_heads=tower.heads, image_size=tower.image_size, patch_size=tower.patch_size, qkv_bias=tower.qkv_bias,
        qk_normalization=tower.qk_norm, norm_type=tower.norm, layer_norm_eps=tower.norm_eps, hidden_act=tower.activation,
        initializer_factor=1.0, num_channels=3,
    )  # fmt: skip
    settings = VllmConfig(device_config=DeviceConfig(device=device))
    with set_current_vllm_config(settings), torch.device(device):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, _VLLM_GROUP, 0, "nccl" if device == "cuda" else "gloo")
            initialize_model_parallel(1, 1)
        model = randomize(InternVisionModel(config)).to(dtype)
        for layer in model.modules():  # vLLM's loader does this after it has loaded the weights
            if method := getattr(layer, "quant_method", None):
                method.process_weights_after_loading(layer)

    class WithVllmConfig(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            with set_current_vllm_config(settings):
                features: Tensor = model(pixels)
                return features

    return WithVllmConfig()

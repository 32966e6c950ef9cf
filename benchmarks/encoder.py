"""Tiles/s of InternViT at its true shape, random weights: ours against transformers' eager tower and vLLM's.

All three in one process, the same tiles, the same dtype, one after another in each repeat. On a GPU also the share of the
card's dense peak, in bf16. What is measured is the tower alone: no decoding, no projector.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.options import Options
from benchmarks.result import Result, ratio_of
from common.layouts.base import Tower
from vision_worker.models import onednn
from vision_worker.models.compiled import CompiledTower
from vision_worker.models.intern_vit import InternViT

M300 = Tower(1024, 4096, 24, 16, 448, 14, "layer_norm", 1e-6, "gelu", True, False)
B6 = Tower(3200, 12800, 45, 25, 448, 14, "rms_norm", 1e-6, "gelu", False, True)
TFLOP = {"300M": 0.724, "6B": 11.94}
"""Of one tile."""
PEAK = {"NVIDIA H200": 790.0}
"""Dense bf16 TFLOP/s that a card can be held to."""


def run(options: Options) -> Result:
    """The headline is ours over transformers' eager tower; target 1.1 on a CPU."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tiles = 32 if cuda else 2
    pixels = torch.randn(tiles, 3, 448, 448, device=device, dtype=dtype)
    tower = _ours(M300, device, dtype)
    if onednn.is_supported(torch.device(device), dtype):
        onednn.optimize(tower)
    towers: dict[str, Callable[[Tensor], Any]] = {
        "ours": tower,
        "ours, compiled": CompiledTower(_ours(M300, device, dtype), tiles, torch.device(device)),
        "transformers": _transformers(device, dtype),
        "vllm": _vllm(device, dtype),
    }
    rates = _rates(towers, pixels, options.repeats(5))
    middle = {name: statistics.median(found) for name, found in rates.items()}
    ratio, spread = ratio_of(rates["ours"], rates["transformers"])
    figures = {
        "tiles/s": {name: round(value, 3) for name, value in middle.items()},
        "over vllm's": round(ratio_of(rates["ours"], rates["vllm"])[0], 3),
        "tiles in a batch": tiles, "device": device, "dtype": str(dtype),
        "TFLOP/s": round(middle["ours"] * TFLOP["300M"], 2),
        **(_on_gpu(options) if cuda else {}),
    }  # fmt: skip
    return Result("encoder", ratio, 1.1, spread, figures)


def _rates(towers: dict[str, Callable[[Tensor], Any]], pixels: Tensor, repeats: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in towers}
    for repeat in range(repeats + 1):
        for name, tower in towers.items():
            seconds = _timed(lambda tower=tower: tower(pixels))  # type: ignore[misc]
            if repeat:  # the first warms
                found[name].append(len(pixels) / seconds)
    return found


@torch.inference_mode()
def _timed(work: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _random(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model.eval()


def _ours(tower: Tower, device: str, dtype: torch.dtype) -> nn.Module:
    with torch.device(device):
        return _random(InternViT(tower, 1025)).to(dtype)


def _transformers(device: str, dtype: torch.dtype) -> nn.Module:
    from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
    from transformers.models.internvl.modeling_internvl import InternVLVisionModel

    config = InternVLVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=[448, 448],
        patch_size=[14, 14], attention_bias=True, use_qk_norm=False, norm_type="layer_norm", hidden_act="gelu",
    )  # fmt: skip
    config._attn_implementation = "eager"
    with torch.device(device):
        return _random(InternVLVisionModel(config)).to(dtype)


def _vllm(device: str, dtype: torch.dtype) -> nn.Module:
    """One rank of one: vLLM builds no layer before it knows its group."""
    from transformers import PretrainedConfig
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.models.intern_vit import InternVisionModel

    config = PretrainedConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=448, patch_size=14,
        qkv_bias=True, qk_normalization=False, norm_type="layer_norm", layer_norm_eps=1e-6, hidden_act="gelu",
        initializer_factor=1.0, num_channels=3,
    )  # fmt: skip
    settings = VllmConfig(device_config=DeviceConfig(device=device))
    with set_current_vllm_config(settings), torch.device(device):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:29511", 0, "nccl" if device == "cuda" else "gloo")
        initialize_model_parallel(1, 1)
        model = _random(InternVisionModel(config)).to(dtype)
        for layer in model.modules():  # as vLLM's loader does when the weights are there
            if method := getattr(layer, "quant_method", None):
                method.process_weights_after_loading(layer)

    class InSettings(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            with set_current_vllm_config(settings):
                found: Tensor = model(pixels)
                return found

    return InSettings()


def _on_gpu(options: Options) -> dict[str, Any]:
    """Both towers in bf16 at several batches: tiles/s, TFLOP/s and the share of the card's peak."""
    peak = next((value for name, value in PEAK.items() if torch.cuda.get_device_name().startswith(name)), None)
    found: dict[str, Any] = {}
    for name, shape in (("300M", M300), ("6B", B6)):
        model = _ours(shape, "cuda", torch.bfloat16)
        for count in (8, 32, 128):
            pixels = torch.randn(count, 3, 448, 448, device="cuda", dtype=torch.bfloat16)
            compiled = CompiledTower(model, count, torch.device("cuda"))
            both: dict[str, Callable[[Tensor], Any]] = {name: model, f"{name}, compiled": compiled}
            for which, rates in _rates(both, pixels, options.repeats(5)).items():
                rate = statistics.median(rates)
                tflops = rate * TFLOP[name]
                share = {"share of the peak": round(tflops / peak, 3)} if peak else {}
                found[f"{which}, {count} tiles"] = {"tiles/s": round(rate, 1), "TFLOP/s": round(tflops, 1), **share}
        del model, both, compiled
        torch.cuda.empty_cache()
    return {"gpu": found}

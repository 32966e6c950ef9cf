"""What a vision worker of a published 8B checkpoint reads and holds: `python benchmarks/vision_memory.py`.

Makes a folder with InternVL3.5-8B-Flash's configuration and shards of the true sizes (sparse files: the language model's 16 GB
take no disk), loads the vision worker's model from it, and prints bytes read and memory held beside the size of the weights.
"""

import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

VISION = {
    "model_type": "intern_vit_6b", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 448, "patch_size": 14, "qkv_bias": True, "qk_normalization": False,
    "norm_type": "layer_norm", "hidden_act": "gelu", "layer_norm_eps": 1e-6,
}  # fmt: skip
LANGUAGE = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36,
    "vocab_size": 151936, "max_position_embeddings": 40960,
}  # fmt: skip
CONFIG = {
    "architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "torch_dtype": "bfloat16", "select_layer": -1,
    "downsample_ratio": 0.5, "ps_version": "v2", "dynamic_image_size": True, "use_thumbnail": True, "min_dynamic_patch": 1,
    "max_dynamic_patch": 12, "force_image_size": 448, "template": "internvl2_5", "flash_mode": True,
    "flash_relative_threshold": 0.5, "flash_absolute_threshold": 0.5, "vision_config": VISION, "llm_config": LANGUAGE,
}  # fmt: skip
LANGUAGE_SHARDS, LANGUAGE_SHARD_BYTES = 3, 5_460_000_000


def make(folder: Path) -> int:
    """Write the checkpoint; the bytes of its vision tensors."""
    import torch

    from common.layouts.opengvlab import describe
    from vision_worker.models.internvl import Model

    (folder / "config.json").write_text(json.dumps(CONFIG))
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in Model(describe(CONFIG, {}), 1025).named_parameters()}
    total = _write(folder / "vision.safetensors", shapes)
    index = dict.fromkeys(shapes, "vision.safetensors")
    for shard in range(LANGUAGE_SHARDS):
        name = f"language_model.part{shard}"
        _write(folder / f"language-{shard}.safetensors", {name: [LANGUAGE_SHARD_BYTES // 2]}, sparse=True)
        index[name] = f"language-{shard}.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return total


def _write(file: Path, shapes: dict[str, list[int]], sparse: bool = False) -> int:
    header: dict[str, Any] = {}
    at = 0
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    packed = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(packed)) + packed)
        if sparse:
            opened.truncate(8 + len(packed) + at)
        else:
            for _ in range(at // (1 << 20)):
                opened.write(bytes(1 << 20))
            opened.write(bytes(at % (1 << 20)))
    return at


LOAD = """
import json, resource, sys
import torch
from vision_worker import encoder

from common.checkpoint import open_checkpoint
def held():
    status = open("/proc/self/status").read()
    return {k: int(status.split(k + ":")[1].split()[0]) * 1024 for k in ("VmRSS", "RssAnon", "RssFile")}
before = held()
made = encoder.load(read_options(VisionOptions, [sys.argv[1], "--device=cpu"], {}), open_checkpoint(sys.argv[1]))
files = {line.split()[-1] for line in open("/proc/self/maps") if line.rstrip().endswith(".safetensors")}
print(json.dumps({"before": before, "after": held(), "still_mapped": sorted(files),
                  "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = make(folder)
        done = subprocess.run([sys.executable, "-c", LOAD, name], capture_output=True, text=True, check=True)
        got = json.loads(done.stdout.splitlines()[-1])
    mib = 2**20
    print(f"checkpoint            {(weights + LANGUAGE_SHARDS * LANGUAGE_SHARD_BYTES) / mib:10,.0f} MiB")
    print(f"vision weights        {weights / mib:10,.0f} MiB")
    print(f"memory before loading {got['before']['VmRSS'] / mib:10,.0f} MiB")
    print(f"memory after loading  {got['after']['VmRSS'] / mib:10,.0f} MiB")
    print(f"held by the model     {(got['after']['VmRSS'] - got['before']['VmRSS']) / mib:10,.0f} MiB")
    print(f"peak                  {got['peak'] / mib:10,.0f} MiB")
    print(f"files still mapped    {', '.join(got['still_mapped']) or 'none':>10}")


if __name__ == "__main__":
    main()

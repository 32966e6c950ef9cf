"""Memory of a vision worker for a published 8B checkpoint: `python -m benchmarks.vision_memory`.

Writes a folder with the configuration of InternVL3.5-8B-Flash and shards of the true sizes; the language model's 16 GB are
sparse files that take no disk space. Loads the vision worker's model from it in a new process and prints the memory that the
process takes, and the size of the weights.
"""

import json
import resource
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common.checkpoint import open_checkpoint

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
_MIB = 1 << 20
_LOAD = "load"


def write_checkpoint(folder: Path) -> int:
    """Write the checkpoint to an existing folder. Returns the bytes of its vision tensors."""
    import torch

    from common.layouts.opengvlab import describe
    from vision_worker.models.internvl import Model

    (folder / "config.json").write_text(json.dumps(CONFIG))
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in Model(describe(CONFIG, {}), 1025).named_parameters()}
    vision_bytes = _write_tensors(folder / "vision.safetensors", shapes)
    index = dict.fromkeys(shapes, "vision.safetensors")
    for shard in range(LANGUAGE_SHARDS):
        name = f"language_model.part{shard}"
        _write_tensors(folder / f"language-{shard}.safetensors", {name: [LANGUAGE_SHARD_BYTES // 2]}, sparse=True)
        index[name] = f"language-{shard}.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return vision_bytes


def _write_tensors(file: Path, shapes: dict[str, list[int]], sparse: bool = False) -> int:
    """Write a safetensors file of bfloat16 zeros. Returns the bytes of its tensors."""
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(encoded)) + encoded)
        if sparse:
            opened.truncate(8 + len(encoded) + offset)
        else:
            for _ in range(offset // _MIB):
                opened.write(bytes(_MIB))
            opened.write(bytes(offset % _MIB))
    return offset


def _resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def _load(folder: str) -> None:
    """Load the model in this process and print its memory in bytes as JSON."""
    import torch  # noqa: F401  # its memory is not the model's

    from common.options import read_options
    from vision_worker import encoder
    from vision_worker.config import VisionOptions

    before = _resident_bytes()
    model = encoder.load(read_options(VisionOptions, [folder, "--device=cpu"], {}), open_checkpoint(folder))
    after = _resident_bytes()
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    figures = {
        "before": before, "after": after, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "still mapped": sorted(file for file in mapped if file.endswith(".safetensors")),
    }  # fmt: skip
    print(json.dumps(figures))
    del model


def main() -> None:
    """Write the checkpoint, load it in a new process and print a table."""
    with tempfile.TemporaryDirectory() as folder:
        vision_bytes = write_checkpoint(Path(folder))
        command = [sys.executable, "-m", "benchmarks.vision_memory", _LOAD, folder]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        memory = json.loads(process.stdout.splitlines()[-1])
    rows = {
        "checkpoint": vision_bytes + LANGUAGE_SHARDS * LANGUAGE_SHARD_BYTES, "vision weights": vision_bytes,
        "memory before loading": memory["before"], "memory after loading": memory["after"],
        "taken by the model": memory["after"] - memory["before"], "peak": memory["peak"],
    }  # fmt: skip
    for name, size in rows.items():
        print(f"{name:<22}{size / _MIB:10,.0f} MiB")
    print(f"{'files still mapped':<22}{', '.join(memory['still mapped']) or 'none':>10}")


if __name__ == "__main__":
    if sys.argv[1:2] == [_LOAD]:
        _load(sys.argv[2])
    else:
        main()

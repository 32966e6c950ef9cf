"""A checkpoint of middling size, random weights: a tile takes a core some hundred milliseconds in either half.

`python -m benchmarks.checkpoint FOLDER` writes it with the router, `--plain` without: stock vLLM cannot load the router's
tensors. All else is equal to the last bit: weights depend on nothing but their names.
"""

import argparse
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from common.layouts import opengvlab
from demo.files import write_json
from demo.model.config import checkpoint_config as demo_config
from demo.text.tokenizer import DemoTokenizer
from vision_worker.models.internvl import Model

VISION = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4}
LANGUAGE = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 64, "max_position_embeddings": 16384,
}  # fmt: skip
SMALL = LANGUAGE | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
"""Reads a tile in a twentieth of the tower's time: what a running answer feels of an image is then its encoding."""


def config(vocabulary: int, flash: bool, dtype: str, language: dict[str, int]) -> dict[str, Any]:
    """`config.json`."""
    made = demo_config(vocabulary)
    made["vision_config"] |= VISION
    made["llm_config"] |= {**language, "torch_dtype": dtype}
    made["torch_dtype"] = dtype
    if not flash:
        made = {name: value for name, value in made.items() if not name.startswith("flash")}
    return made


def make(folder: Path, flash: bool = True, dtype: str = "float32", language: dict[str, int] = LANGUAGE) -> Path:
    """Write it. `language`: sizes of the language model."""
    folder.mkdir(parents=True, exist_ok=True)
    words = DemoTokenizer()
    said = config(words.size, flash, dtype, language)
    with torch.device("meta"):
        vision = Model(opengvlab.LAYOUT.describe(said, {}), 1025)
        reader = Qwen3ForCausalLM(Qwen3Config(**said["llm_config"]))
    shapes = {name: tensor.shape for name, tensor in vision.state_dict().items()}
    shapes |= {f"language_model.{name}": tensor.shape for name, tensor in reader.state_dict().items()}
    save_file(
        {name: _drawn(name, shape).to(getattr(torch, dtype)) for name, shape in shapes.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    write_json(folder / "config.json", said)
    write_json(folder / "generation_config.json", {"eos_token_id": 2, "pad_token_id": 0})
    write_json(folder / "preprocessor_config.json", {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]})
    words.save(folder)
    return folder


def _drawn(name: str, shape: torch.Size) -> torch.Tensor:
    """Activations keep their size from layer to layer; norms and layer scales are ones."""
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    deviation = 1.0 if "embed_tokens" in name else shape[1:].numel() ** -0.5
    return torch.randn(shape, generator=generator) * deviation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plain", action="store_true", help="without router and second projector")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    said = parser.parse_args()
    print(make(said.folder, not said.plain, said.dtype))


if __name__ == "__main__":
    main()

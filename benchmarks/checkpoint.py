"""Writes a medium-sized checkpoint with random weights, a tile of which takes a core 100 to 200 ms in each half.

`python -m benchmarks.checkpoint FOLDER` writes it with the router (ViR), `--plain` without: stock vLLM cannot load the
router's tensors. All other tensors are bitwise equal, because weights depend only on their names.
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
from demo.model.config import checkpoint_config
from demo.text.tokenizer import DemoTokenizer
from vision_worker.models.internvl import Model

VISION = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4}
LANGUAGE = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 64, "max_position_embeddings": 16384,
}  # fmt: skip
SMALL_LANGUAGE = LANGUAGE | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
"""Prefills a tile in a twentieth of the tower's time, so that encoding dominates what an image costs running streams."""


def config(vocabulary: int, flash: bool, dtype: str, language: dict[str, int]) -> dict[str, Any]:
    """Content of `config.json` for a `vocabulary` size, with the router if `flash`, and the sizes of the language model."""
    content = checkpoint_config(vocabulary)
    content["vision_config"] |= VISION
    content["llm_config"] |= {**language, "torch_dtype": dtype}
    content["torch_dtype"] = dtype
    if not flash:
        content = {name: value for name, value in content.items() if not name.startswith("flash")}
    return content


def write_checkpoint(folder: Path, flash: bool = True, dtype: str = "float32", language: dict[str, int] = LANGUAGE) -> Path:
    """Write a checkpoint with random weights and the demo's tokenizer.

    Args:
        folder: Folder to write to; it is created.
        flash: Whether the checkpoint has a router and a second projector.
        dtype: Data type of all weights.
        language: Sizes of the language model, keys of a Qwen3 configuration.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = DemoTokenizer()
    content = config(tokenizer.size, flash, dtype, language)
    with torch.device("meta"):
        vision_model = Model(opengvlab.LAYOUT.describe(content, {}), 1025)
        language_model = Qwen3ForCausalLM(Qwen3Config(**content["llm_config"]))
    shapes = {name: tensor.shape for name, tensor in vision_model.state_dict().items()}
    shapes |= {f"language_model.{name}": tensor.shape for name, tensor in language_model.state_dict().items()}
    save_file(
        {name: _random_tensor(name, shape).to(getattr(torch, dtype)) for name, shape in shapes.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    write_json(folder / "config.json", content)
    write_front_end(folder, tokenizer)
    return folder


def write_front_end(folder: Path, tokenizer: DemoTokenizer) -> None:
    """Write what a checkpoint has besides weights and `config.json`: the tokenizer, and the settings of answers and images."""
    write_json(folder / "generation_config.json", {"eos_token_id": 2, "pad_token_id": 0})
    write_json(folder / "preprocessor_config.json", {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]})
    tokenizer.save(folder)


def _random_tensor(name: str, shape: torch.Size) -> torch.Tensor:
    """Weights that keep the scale of activations from layer to layer; norms and layer scales are ones."""
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    deviation = 1.0 if "embed_tokens" in name else shape[1:].numel() ** -0.5
    return torch.randn(shape, generator=generator) * deviation


def main() -> None:
    """Write a checkpoint from the command line and print its folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plain", action="store_true", help="leave out the router and the second projector")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parsed = parser.parse_args()
    print(write_checkpoint(parsed.folder, not parsed.plain, parsed.dtype))


if __name__ == "__main__":
    main()

"""The trained model as a checkpoint in the published layout."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from demo.files import write_json
from demo.model.config import checkpoint_config
from demo.model.demo_model import DemoModel
from demo.scenes.scene import TILE_PIXELS
from demo.text.tokenizer import EOS_ID, PAD_ID, DemoTokenizer


def write_checkpoint(
    model: DemoModel, tokenizer: DemoTokenizer, folder: Path, relative_threshold: float, absolute_threshold: float
) -> None:
    """Write all files of the checkpoint: bfloat16, one file of weights, every tensor that the published layout has."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(model.vision.state_dict())
    tensors |= {f"language_model.{n}": t for n, t in model.language.state_dict().items()}
    for i in (3, 4):  # the published router has these layers and does not use them
        for kind in ("attn", "norm"):
            source = f"pooling_before_gating.{kind}{i - 2}."
            tensors |= {n.replace(f"{kind}{i - 2}", f"{kind}{i}"): t for n, t in tensors.items() if n.startswith(source)}
    save_file(
        {name: tensor.detach().to(torch.bfloat16).contiguous().clone() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    write_json(folder / "config.json", checkpoint_config(tokenizer.size, relative_threshold, absolute_threshold))
    write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": PAD_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID, "max_new_tokens": 64,
            # vLLM reads the temperature and ignores do_sample, transformers the opposite
            "do_sample": False, "temperature": 0.0,
        },
    )  # fmt: skip
    write_json(
        folder / "preprocessor_config.json",
        {
            "crop_size": TILE_PIXELS, "do_center_crop": True, "do_normalize": True, "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225], "resample": 3, "size": TILE_PIXELS,
        },
    )  # fmt: skip
    tokenizer.save(folder)

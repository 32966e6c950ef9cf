"""The files of tiny checkpoints: random weights, tokenizer, chat template and preprocessor configuration."""

import json
import math
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.checkpoint_language import EOS, PAD, Config, Shapes

TOKENIZER = Path(__file__).parent / "data" / "tokenizer"

SEPARATORS = {
    "internvl2_5": "<|im_end|>\n",
    "Hermes-2": "<|im_end|>",
    "internlm2-chat": "<|im_end|>",
    "phi3-chat": "<|end|>",
    "internvl3_5_gpt_oss": "<|end|>",
}
"""The end of a turn in each conversation template."""

_ROUTER_GAIN = {"gating.gate.1.weight": 9.0}
"""Gains of some tensors: spreads the router's scores, so that some tiles are compressed and some are not."""


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Returns a random tensor that depends only on its name, its shape and the seed."""
    part = name.rsplit(".", 2)[-2:]
    if part[-1] in ("ls1", "ls2", "lambda_1", "lambda_2"):
        return torch.ones(shape)
    if part[-1] == "weight" and len(shape) == 1:
        return torch.ones(shape)  # a norm
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ seed)
    return torch.randn(shape, generator=generator) * _deviation(name, shape)


def _deviation(name: str, shape: tuple[int, ...]) -> float:
    if name.endswith(("embed_tokens.weight", "tok_embeddings.weight", "sinks")):
        return 1.0
    if name.endswith("bias") or ("embedding" in name and "patch" not in name) or name.endswith("cls_token"):
        return 0.05
    experts = len(shape) == 3 and ".experts." in name
    fan_in = shape[1] if experts else math.prod(shape[1:])
    gain = 1.6 if "language_model." in name or "lm_head" in name else _ROUTER_GAIN.get(name, 0.9)
    return gain / math.sqrt(fan_in)


def write_weights(folder: Path, shapes: Shapes, dtype: str, seed: int, shards: int) -> None:
    """Writes random weights to `shards` safetensors files, with an index where there is more than one."""
    tensors = {name: random_tensor(name, shape, seed).to(getattr(torch, dtype)) for name, shape in shapes.items()}
    if shards == 1:
        _write_safetensors(tensors, folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(_split(sorted(tensors), shards), start=1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        _write_safetensors({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})


def _write_safetensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors writes 0600, and a container runs as another user


def _split(names: list[str], parts: int) -> Iterator[list[str]]:
    size = math.ceil(len(names) / parts)
    return (names[i * size : (i + 1) * size] for i in range(parts))


def write_common_files(folder: Path, config: Config, template: str) -> None:
    """Writes the tokenizer, config.json, generation_config.json and the chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in TOKENIZER.iterdir():
        shutil.copyfile(file, folder / file.name)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": EOS, "pad_token_id": PAD, "do_sample": False})
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _turns(template: str) -> tuple[str, str, str]:
    """Returns Jinja expressions for the begin of a turn, the begin of the answer and the end of a turn."""
    end = json.dumps(SEPARATORS[template])
    if template == "phi3-chat":
        return r"'<|' + message['role'] + '|>\n'", r"'<|assistant|>\n'", end
    if template == "internvl3_5_gpt_oss":
        answer = "'<|start|>assistant<|channel|>final<|message|>'"
        return "'<|start|>' + message['role'] + '<|message|>'", answer, end
    return r"'<|im_start|>' + message['role'] + '\n'", r"'<|im_start|>assistant\n'", end


def chat_template(template: str, placeholder: str) -> str:
    """Returns a Jinja template that takes content parts and writes `placeholder` for an image."""
    begin, answer, end = _turns(template)
    parts = (
        "{% for message in messages %}{{ ", begin, " }}",
        "{% if message['content'] is string %}{{ message['content'] }}",
        "{% else %}{% for content in message['content'] %}",
        "{% if content['type'] == 'image' %}{{ ", json.dumps(placeholder), " }}",
        "{% elif content['type'] == 'video' %}{{ '<video>\\n' }}",
        "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}",
        "{% endfor %}{% endif %}{{ ", end, " }}{% endfor %}",
        "{% if add_generation_prompt %}{{ ", answer, " }}{% endif %}",
    )  # fmt: skip
    return "".join(parts)


def make_chat_template_text_only(folder: Path, template: str) -> None:
    """Moves the chat template to tokenizer_config.json, where a message's content can only be a string.

    Exports before InternVL3.5 have it so.
    """
    begin, answer, end = _turns(template)
    text = f"{{% for message in messages %}}{{{{ {begin} + message['content'] + {end} }}}}{{% endfor %}}"
    text += f"{{% if add_generation_prompt %}}{{{{ {answer} }}}}{{% endif %}}"
    (folder / "chat_template.jinja").unlink()
    write_json(folder / "tokenizer_config.json", read_json(folder / "tokenizer_config.json") | {"chat_template": text})


def read_json(file: Path) -> Config:
    """Returns the object in a JSON file."""
    return dict(json.loads(file.read_text(encoding="utf-8")))


def write_json(file: Path, value: Mapping[str, object]) -> None:
    """Writes an object to a JSON file."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


_MEAN, _DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

CLIP_PREPROCESSOR = {
    "crop_size": 448, "do_center_crop": True, "do_normalize": True, "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": _MEAN, "image_std": _DEVIATION, "resample": 3,
    "size": 448,
}  # fmt: skip

NATIVE_PREPROCESSOR = {
    "crop_to_patches": True, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
    "image_mean": _MEAN, "image_processor_type": "GotOcr2ImageProcessorFast", "image_std": _DEVIATION,
    "max_patches": 12, "min_patches": 1, "processor_class": "InternVLProcessor", "resample": 3,
    "rescale_factor": 1 / 255, "size": {"height": 448, "width": 448},
}  # fmt: skip

NATIVE_TOKENIZER = {
    "context_image_token": "<IMG_CONTEXT>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "video_token": "<video>",
    "extra_special_tokens": {
        "context_image_token": "<IMG_CONTEXT>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "video_token": "<video>",
    },
    "processor_class": "InternVLProcessor",
}

"""The model that is trained: the vision worker's own InternVL and transformers' Qwen3, and how it becomes a checkpoint."""

import math
import time
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from common.layouts import opengvlab
from demo.batches import Rows, Talk
from demo.files import write_json
from demo.scenes import FULL, GRID, PATCH
from demo.words import EOS, PAD, Words
from vision_worker.models.intern_vit import InternViT, Layer
from vision_worker.models.internvl import Model, normalize, pixel_shuffle

WIDTH, LAYERS, HEADS = 192, 4, 6  # of the tower
HIDDEN, LANGUAGE_LAYERS, LANGUAGE_HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 256, 4, 4, 2, 64, 768
CONTEXT = 8192


def config(vocabulary: int, relative: float = 0.2, absolute: float = 0.5) -> dict[str, Any]:
    """`config.json`, in the layout of the published InternVL3.5-Flash."""
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "force_image_size": FULL,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "select_layer": -1,
        "ps_version": "v2",
        "template": "internvl2_5",
        "torch_dtype": "bfloat16",
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "image_size": FULL,
            "patch_size": PATCH,
            "num_channels": 3,
            "hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "norm_type": "layer_norm",
            "qkv_bias": True,
            "qk_normalization": False,
            "attention_dropout": 0.0,
            "dropout": 0.0,
            "drop_path_rate": 0.0,
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "use_flash_attn": False,
        },
        "llm_config": {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": vocabulary,
            "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "num_hidden_layers": LANGUAGE_LAYERS,
            "num_attention_heads": LANGUAGE_HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "max_position_embeddings": CONTEXT,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 100000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": PAD,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        },
        "flash_mode": True,
        "flash_relative_threshold": relative,
        "flash_absolute_threshold": absolute,
    }


class Read:
    """Prefixes [n, length, HIDDEN] as the language model has read them: keys and values, and `hidden` after two layers."""

    def __init__(self, language: Qwen3ForCausalLM, prefix: Tensor) -> None:
        self.cache = DynamicCache(config=language.config)
        read = language.model(inputs_embeds=prefix, past_key_values=self.cache, use_cache=True, output_hidden_states=True)
        self.hidden = cast(Tensor, read.hidden_states[2]).float()
        self.length = prefix.shape[1]


class Trainee(nn.Module):
    """InternVL under OpenGVLab's names, and the language model. All it returns is float32.

    `mixed`: products in bfloat16, where the device is quicker at them (`quicker_in_bf16`).
    """

    mixed = False

    def __init__(self, words: Words) -> None:
        super().__init__()
        said = config(words.size)
        self.vision = Model(opengvlab.LAYOUT.describe(said, {}), GRID**2 + 1)
        self.language = Qwen3ForCausalLM(Qwen3Config(**said["llm_config"], initializer_range=0.05))
        self.vision.apply(_start)
        nn.init.normal_(self.vision.pooling_before_gating.query_token, std=0.02)
        _look_around(self.vision.vision_model)

    def forward(self, tiles: Tensor, corners: Tensor | None = None) -> Tensor:
        """uint8 tiles [n, side, side, 3] to features [n, patches, WIDTH].

        A tile smaller than FULL is a piece of one: `corners` [n, 2] says the row and column of its first patch.
        """
        with self._products():
            return self._features(tiles, corners).float()

    def _products(self) -> torch.autocast:
        return torch.autocast(self.language.device.type, torch.bfloat16, enabled=self.mixed)

    def _features(self, tiles: Tensor, corners: Tensor | None) -> Tensor:
        tower = self.vision.vision_model
        if corners is None:
            return cast(Tensor, tower(normalize(tiles)))
        patches = tower.embeddings.patch_embedding(normalize(tiles))
        side = patches.shape[-1]
        rows, columns = (corners[:, i, None] + torch.arange(side, device=corners.device) for i in (0, 1))
        positions = tower.embeddings.position_embedding[0]
        places = positions[1 + rows[:, :, None] * GRID + columns[:, None]].flatten(1, 2)
        first = (tower.embeddings.class_embedding[0] + positions[:1]).expand(len(tiles), 1, -1)
        x = torch.cat([first, patches.flatten(2).mT + places], dim=1)
        for layer in tower.encoder.layers:
            x = layer(x)
        return x[:, 1:]

    def project(self, features: Tensor, compressed: Tensor) -> list[Tensor]:
        """Visual tokens of each tile, [256 or 64, HIDDEN]; `compressed` bool [n]."""
        found: list[Tensor | None] = [None] * len(features)
        for small, factor, projector in ((False, 0.5, self.vision.mlp1), (True, 0.25, self.vision.mlp2)):
            chosen = (compressed == small).nonzero().flatten().tolist()
            if chosen:
                with self._products():
                    tokens = projector(pixel_shuffle(features[chosen], factor, "v2")).float()
                for i, block in zip(chosen, tokens, strict=True):
                    found[i] = block
        return [cast(Tensor, block) for block in found]

    def read(self, prefix: Tensor) -> "Read":
        with self._products():
            return Read(self.language, prefix)

    def answer(self, read: "Read | None", rows: Rows) -> Tensor:
        """Logits [told, vocabulary] where an answer is told, of texts after prefixes or after nothing.

        A prefix is read once for all that follows it; what was read is used up.
        """
        length = read.length if read else 0
        with self._products():
            hidden = self.language.model(
                inputs_embeds=self.embed(rows.ids),
                attention_mask=alone(rows, length)[:, None],
                position_ids=length + rows.places,
                past_key_values=read.cache if read else None,
                use_cache=read is not None,
            ).last_hidden_state
        return cast(Tensor, self.language.lm_head(hidden[rows.answers >= 0].float()))

    def prefixes(self, talk: Talk, features: Tensor, compressed: Tensor) -> Tensor:
        """What stands before the questions, [prefixes, length, HIDDEN], by the paths `compressed` [images, tiles]."""
        blocks = self.project(features, compressed.flatten())
        opening, between, end = (
            self.embed(torch.tensor(ids, device=features.device)) for ids in (talk.opening, talk.between, talk.end)
        )
        images, tiles = compressed.shape
        found = []
        for first in range(0, images, talk.together):
            parts = [opening]
            for image in range(first, first + talk.together):
                parts += [*([between] if image > first else []), *blocks[image * tiles : (image + 1) * tiles]]
            found.append(torch.cat([*parts, end]))
        return torch.stack(found)

    def embed(self, ids: Tensor) -> Tensor:
        return cast(Tensor, self.language.model.embed_tokens(ids))


def quicker_in_bf16(device: torch.device) -> bool:
    """Measured: a CPU without the instructions multiplies bfloat16 more slowly than float32, and nothing public says which."""
    return _seconds(device, torch.bfloat16) < 0.7 * _seconds(device, torch.float32)


def _seconds(device: torch.device, dtype: torch.dtype) -> float:
    """The best of five products of the size that training is made of."""
    a, b = torch.ones(4096, HIDDEN, device=device, dtype=dtype), torch.ones(HIDDEN, INTERMEDIATE, device=device, dtype=dtype)
    took = []
    for _ in range(5):
        began = time.perf_counter()
        float((a @ b)[0, 0])  # waits for the device
        took.append(time.perf_counter() - began)
    return min(took)


def alone(rows: Rows, prefix: int) -> Tensor:
    """What each token sees, bool [prefixes, length, prefix + length]: the prefix, and its own conversation up to itself."""
    own = (rows.numbers[:, :, None] == rows.numbers[:, None]).tril()
    return torch.cat([own.new_ones(*own.shape[:2], prefix), own], dim=-1)


def _start(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=min(0.05, (1 / module.in_features) ** 0.5))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    for name, tensor in module.named_parameters(recurse=False):
        if name == "in_proj_weight":
            nn.init.xavier_uniform_(tensor)
        if name == "in_proj_bias":
            nn.init.zeros_(tensor)


@torch.no_grad()
def _look_around(tower: InternViT) -> None:
    """Give the tower something like a convolution to begin with: heads of two layers look at a patch near by.

    Positions begin as sines and cosines of both coordinates; then a head sees the patch `offset` away if its query is
    its own position turned by the offset. From noise, a tower this small finds its neighbours very late (the idea is
    ConViT's, d'Ascoli et al. 2021; here it is only where training begins).
    """
    rates = 2 * 30.0 ** (-torch.arange(_WAVES) / _WAVES)
    phases = torch.arange(GRID)[:, None] * rates
    line = torch.cat([phases.sin(), phases.cos()], dim=1)
    down, across = line[:, None].expand(GRID, GRID, -1), line[None].expand(GRID, GRID, -1)
    where = 4 * _WAVES
    tower.embeddings.position_embedding[0, 1:] = 0
    tower.embeddings.position_embedding[0, 1:, :where] = torch.cat([down, across], dim=-1).flatten(0, 1)
    tower.embeddings.patch_embedding.weight.zero_()
    tower.embeddings.patch_embedding.weight[where:] = _cosines(WIDTH - where)
    nn.init.zeros_(cast(Tensor, tower.embeddings.patch_embedding.bias))
    for layer, offsets in zip(tower.encoder.layers, _OFFSETS, strict=False):
        for head, offset in enumerate(offsets):
            _point(cast(Layer, layer).attn.qkv.weight, head, offset, rates)


_WAVES = 12  # an axis; positions begin in dimensions of their own, so that what a patch shows is not blurred by where it is
_OFFSETS = (
    ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1)),
    ((1, -1), (-1, 1), (0, 2), (0, -2), (2, 0), (-2, 0)),
)


def _point(qkv: Tensor, head: int, offset: tuple[int, int], rates: Tensor) -> None:
    """Turn one head's query and key towards the patch `offset` (rows, columns) away, by the quickest waves."""
    width = WIDTH // HEADS
    query, key = qkv[head * width : (head + 1) * width], qkv[WIDTH + head * width : WIDTH + (head + 1) * width]
    query[:] = key[:] = 0
    gain, row = 1.0, 0
    for axis, distance in enumerate(offset):
        for wave in range(width // 4):
            sine, cosine = (2 * axis) * _WAVES + wave, (2 * axis + 1) * _WAVES + wave
            turn = float(rates[wave]) * distance
            key[row, sine] = key[row + 1, cosine] = gain
            query[row, sine], query[row, cosine] = gain * math.cos(turn), gain * math.sin(turn)
            query[row + 1, cosine], query[row + 1, sine] = gain * math.cos(turn), -gain * math.sin(turn)
            row += 2


def _cosines(count: int) -> Tensor:
    """Filters [count, 3, PATCH, PATCH]: the slowest two-dimensional cosines of brightness and of two colour differences."""
    at = (torch.arange(PATCH) + 0.5) * math.pi / PATCH
    axes = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])
    axes = axes / axes.norm(dim=1, keepdim=True)
    order = sorted(((u, v) for u in range(PATCH) for v in range(PATCH)), key=lambda f: (f[0] ** 2 + f[1] ** 2, f))
    waves = [torch.outer((u * at).cos(), (v * at).cos()) for u, v in order[: count // 3]]
    shaped = [wave / wave.norm() * (0.03 if i == 0 else 0.8) for i, wave in enumerate(waves)]  # flat patches are common
    return torch.cat([torch.einsum("c,hw->chw", axis, wave)[None] for wave in shaped for axis in axes])


def write(model: Trainee, words: Words, folder: Path, relative: float, absolute: float) -> None:
    """The checkpoint: bf16, in one file, every tensor that the published layout has."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(model.vision.state_dict())
    tensors |= {f"language_model.{n}": t for n, t in model.language.state_dict().items()}
    for i in (3, 4):  # the published router carries these two, and never uses them
        for kind in ("attn", "norm"):
            source = f"pooling_before_gating.{kind}{i - 2}."
            tensors |= {n.replace(f"{kind}{i - 2}", f"{kind}{i}"): t for n, t in tensors.items() if n.startswith(source)}
    save_file(
        {name: tensor.detach().to(torch.bfloat16).contiguous().clone() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    write_json(folder / "config.json", config(words.size, relative, absolute))
    write_json(
        folder / "generation_config.json", {"bos_token_id": PAD, "eos_token_id": EOS, "pad_token_id": PAD, "max_new_tokens": 64}
    )
    write_json(
        folder / "preprocessor_config.json",
        {
            "crop_size": FULL, "do_center_crop": True, "do_normalize": True, "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225], "resample": 3, "size": FULL,
        },
    )  # fmt: skip
    words.save(folder)

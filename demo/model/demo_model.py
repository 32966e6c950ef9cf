"""The model that is trained: the vision worker's own InternVL modules and the Qwen3 of transformers."""

import functools
import time
from typing import cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from common.layouts import opengvlab
from demo.batches.types import ConversationBatch, ConversationRows
from demo.model.config import LANGUAGE_MLP_WIDTH, LANGUAGE_WIDTH, checkpoint_config
from demo.model.initialisation import initialise_vision
from demo.scenes.scene import TILE_PATCHES
from demo.text.tokenizer import DemoTokenizer
from vision_worker.models.internvl import Model, normalize, pixel_shuffle


class EncodedPrefix:
    """Prefixes after the language model: the key-value cache, and the hidden states after two layers.

    Attributes:
        cache: Keys and values. One call of `DemoModel.answer_logits` uses it up.
        hidden: float32 [prefixes, length, LANGUAGE_WIDTH].
        length: Tokens of a prefix.
    """

    def __init__(self, language: Qwen3ForCausalLM, embeddings: Tensor) -> None:
        self.cache = DynamicCache(config=language.config)
        output = language.model(inputs_embeds=embeddings, past_key_values=self.cache, use_cache=True, output_hidden_states=True)
        self.hidden = cast(Tensor, output.hidden_states[2]).float()
        self.length = embeddings.shape[1]


class DemoModel(nn.Module):
    """InternVL under OpenGVLab's tensor names, and the language model. All outputs are float32.

    Attributes:
        use_bfloat16: Whether matrix products run in bfloat16. See `is_bfloat16_faster`.
    """

    use_bfloat16 = False

    def __init__(self, tokenizer: DemoTokenizer) -> None:
        super().__init__()
        config = checkpoint_config(tokenizer.size)
        self.vision = Model(opengvlab.LAYOUT.describe(config, {}), TILE_PATCHES**2 + 1)
        self.language = Qwen3ForCausalLM(Qwen3Config(**config["llm_config"], initializer_range=0.05))
        initialise_vision(self.vision)

    def forward(self, tiles: Tensor, crop_origins: Tensor | None = None) -> Tensor:
        """Return the features of tiles, [n, patches, VISION_WIDTH].

        Args:
            tiles: uint8 [n, side, side, 3].
            crop_origins: int64 [n, 2], for tiles that are crops of a full tile: row and column of the first patch.
        """
        with self._autocast():
            return self._tower_features(tiles, crop_origins).float()

    def project(self, features: Tensor, compressed: Tensor) -> list[Tensor]:
        """Return the visual tokens of each tile, [256 or 64, LANGUAGE_WIDTH]. `compressed`: bool [n]."""
        tokens: list[Tensor | None] = [None] * len(features)
        for short, factor, projector in ((False, 0.5, self.vision.mlp1), (True, 0.25, self.vision.mlp2)):
            chosen = (compressed == short).nonzero().flatten().tolist()
            if chosen:
                with self._autocast():
                    projected = projector(pixel_shuffle(features[chosen], factor, "v2")).float()
                for i, tile_tokens in zip(chosen, projected, strict=True):
                    tokens[i] = tile_tokens
        return [cast(Tensor, tile_tokens) for tile_tokens in tokens]

    def build_prefixes(self, batch: ConversationBatch, features: Tensor, compressed: Tensor) -> Tensor:
        """Return the embeddings of all that precedes the questions, [prefixes, length, LANGUAGE_WIDTH].

        Args:
            batch: The batch; its own `compressed` is not used.
            features: Features of its tiles.
            compressed: bool [images, tiles]: which tiles take the short path.
        """
        tile_tokens = self.project(features, compressed.flatten())
        opening, separator, closing = (
            self.embed(torch.tensor(ids, device=features.device)) for ids in (batch.opening, batch.separator, batch.closing)
        )
        images, tiles = compressed.shape
        prefixes = []
        for first in range(0, images, batch.images_per_prefix):
            parts = [opening]
            for image in range(first, first + batch.images_per_prefix):
                parts += [*([separator] if image > first else []), *tile_tokens[image * tiles : (image + 1) * tiles]]
            prefixes.append(torch.cat([*parts, closing]))
        return torch.stack(prefixes)

    def encode_prefixes(self, prefixes: Tensor) -> EncodedPrefix:
        """Run the language model over prefixes, once for all conversations that follow them."""
        with self._autocast():
            return EncodedPrefix(self.language, prefixes)

    def answer_logits(self, prefix: EncodedPrefix | None, rows: ConversationRows) -> Tensor:
        """Return the logits of all answer tokens, [answer tokens, vocabulary].

        `prefix`: what the rows follow, or None for text without images. Its cache is used up.
        """
        length = prefix.length if prefix else 0
        with self._autocast():
            hidden = self.language.model(
                inputs_embeds=self.embed(rows.ids),
                attention_mask=conversation_mask(rows, length)[:, None],
                position_ids=length + rows.positions,
                past_key_values=prefix.cache if prefix else None,
                use_cache=prefix is not None,
            ).last_hidden_state
        return cast(Tensor, self.language.lm_head(hidden[rows.answer_mask].float()))

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings of token ids."""
        return cast(Tensor, self.language.model.embed_tokens(ids))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.language.device.type, torch.bfloat16, enabled=self.use_bfloat16)

    def _tower_features(self, tiles: Tensor, crop_origins: Tensor | None) -> Tensor:
        tower = self.vision.vision_model
        if crop_origins is None:
            return cast(Tensor, tower(normalize(tiles)))
        patches = tower.embeddings.patch_embedding(normalize(tiles))
        side = patches.shape[-1]
        rows, columns = (crop_origins[:, i, None] + torch.arange(side, device=crop_origins.device) for i in (0, 1))
        positions = tower.embeddings.position_embedding[0]
        patch_positions = positions[1 + rows[:, :, None] * TILE_PATCHES + columns[:, None]].flatten(1, 2)
        class_token = (tower.embeddings.class_embedding[0] + positions[:1]).expand(len(tiles), 1, -1)
        x = torch.cat([class_token, patches.flatten(2).mT + patch_positions], dim=1)
        for layer in tower.encoder.layers:
            x = layer(x)
        return x[:, 1:]


def conversation_mask(rows: ConversationRows, prefix_length: int) -> Tensor:
    """Return what each token attends to, bool [prefixes, length, prefix_length + length].

    That is the prefix, and the token's own conversation up to itself.
    """
    own = (rows.conversations[:, :, None] == rows.conversations[:, None]).tril()
    return torch.cat([own.new_ones(*own.shape[:2], prefix_length), own], dim=-1)


@functools.cache  # measuring takes seconds
def is_bfloat16_faster(device: torch.device) -> bool:
    """Measure whether bfloat16 products are clearly faster than float32.

    A CPU without bfloat16 instructions is slower at them, and torch has no public way to ask for the instructions.
    """
    return _product_seconds(device, torch.bfloat16) < 0.7 * _product_seconds(device, torch.float32)


def _product_seconds(device: torch.device, dtype: torch.dtype) -> float:
    """Return the shortest of three times of a product like those that training consists of."""
    a = torch.ones(1024, LANGUAGE_WIDTH, device=device, dtype=dtype)
    b = torch.ones(LANGUAGE_WIDTH, LANGUAGE_MLP_WIDTH, device=device, dtype=dtype)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        float((a @ b)[0, 0])  # waits for the device
        times.append(time.perf_counter() - start)
    return min(times)

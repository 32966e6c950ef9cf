"""The tokenizer of the demo checkpoint, and its chat template."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from demo.files import write_json
from demo.scenes.scene import COLOURS, POSITIONS, SHAPES
from demo.text.questions import Question, plural
from demo.text.small_talk import (
    ABILITIES_ANSWER,
    GREETING_ANSWER,
    NO_IMAGE_ANSWER,
    SYSTEM_PROMPTS,
    UNKNOWN_ANSWER,
    small_talk_question,
)

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>",
    "<box>", "</box>",
)  # fmt: skip
PAD_ID, EOS_ID, IMAGE_TOKEN_ID = 0, 2, 5
"""Indices into `SPECIAL_TOKENS`."""
IGNORED_LABEL = -100
"""Label of tokens that the model is not trained to predict."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% set texts = namespace(count=0) %}{% for content in message['content'] %}"
    "{% if content['type'] == 'text' and not content['text'].startswith('Frame') %}{% set texts.count = texts.count + 1 %}"
    "{% endif %}{% endfor %}"
    "{% set question_first = texts.count == 1 and message['content'][0]['type'] == 'text'"
    " and not message['content'][0]['text'].startswith('Frame') %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<image>\\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\\n' }}"
    "{% elif content['type'] == 'text' and not (question_first and loop.first) %}{{ content['text'] }}{% endif %}{% endfor %}"
    "{% if question_first %}{{ message['content'][0]['text'] }}{% endif %}"
    "{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Parts keep their order, with one exception: a question that precedes all images follows them, as in training.

Labels of video frames ("Frame1: ") stay with their frames, wherever the question is.
"""
_VOCABULARY_SIZE = 1024


class DemoTokenizer:
    """A byte-level BPE tokenizer. It encodes any text, the questions in few tokens, and digits one by one."""

    def __init__(self) -> None:
        self._tokenizer = Tokenizer(models.BPE())
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False),
        ])  # fmt: skip
        self._tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=_VOCABULARY_SIZE,
            special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        self._tokenizer.train_from_iterator(_corpus(), trainer)

    @property
    def size(self) -> int:
        """Number of tokens in the vocabulary."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text. Special tokens in it are recognised."""
        return list(self._tokenizer.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return str(self._tokenizer.decode(list(ids)))

    def encode_conversation(self, turns: Sequence[Question], prefix: str) -> tuple[list[int], list[int]]:
        """Return token ids and labels of questions with their answers.

        Args:
            turns: The questions, in order.
            prefix: Text of the first user turn before its question.

        Returns:
            The ids and, for each, the id of the next token if that belongs to an answer, else `IGNORED_LABEL`.
        """
        ids: list[int] = []
        labels: list[int] = []
        for i, turn in enumerate(turns):
            start = prefix if i == 0 else "\n<|im_start|>user\n"
            question = self.encode(f"{start}{turn.text}<|im_end|>\n<|im_start|>assistant\n")
            answer = self.encode(f"{turn.answer}<|im_end|>")
            ids += question + answer
            labels += [IGNORED_LABEL] * (len(question) - 1) + answer + [IGNORED_LABEL]
        return ids, labels

    def save(self, folder: Path) -> None:
        """Write the tokenizer and the chat template in the files that transformers reads."""
        self._tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
        config = {
            "backend": "tokenizers",
            "eos_token": SPECIAL_TOKENS[EOS_ID],
            "pad_token": SPECIAL_TOKENS[PAD_ID],
            "extra_special_tokens": list(SPECIAL_TOKENS[1:]),
            "model_max_length": 8192,
            "tokenizer_class": "TokenizersBackend",
        }
        write_json(folder / "tokenizer_config.json", config)


def _corpus() -> Iterator[str]:
    """Yield the texts the merges are learned from. Any change here changes the tokenizer, and so the checkpoint."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        for name in SHAPES:
            for colour in COLOURS:
                yield f"What colour is the {name}? What color is the {name}? Is there a {colour} {name}?"
                yield f"Is there an orange {name}? What shape is the {colour} object? How many {plural(name)} are there?"
                yield f"Where is the {name}? There is no {name}."
                yield "What number is written? Are the two images the same? yes no There is no number. user assistant system"
        yield from (*POSITIONS, *COLOURS, *SHAPES, *SYSTEM_PROMPTS)
        yield from (ABILITIES_ANSWER, GREETING_ANSWER, UNKNOWN_ANSWER, NO_IMAGE_ANSWER)
        yield from ("yes", "no", "user", "assistant", "system")
    for _ in range(4000):
        yield small_talk_question(rng).text

"""What may be asked of a scene, the answers, and the tokenizer of both."""

import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from demo.files import write_json
from demo.scenes import COLOURS, PLACES, SHAPES, Scene, Shape, place, shares

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>",
    "<box>", "</box>",
)  # fmt: skip
PAD, EOS, IMAGE_TOKEN = 0, 2, 5  # places in SPECIAL
UNKNOWN = "I don't know."
ABILITIES = "I can name the colour, shape and place of objects, count them, read a number and compare two images."
GREETING = "Hello! Show me an image with shapes or a number and ask about it."

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<image>\\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\\n' }}{% endif %}{% endfor %}"
    "{% for content in message['content'] %}{% if content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Images stand before a message's text, whatever their order in the request: the model has only seen them so."""


@dataclass(frozen=True)
class Asked:
    task: str  # colour, shape, count, place, number, presence, same, or other
    question: str
    answer: str


def questions(scene: Scene, rng: np.random.Generator) -> list[Asked]:
    """One of each task that the scene has a clear answer to, in random order."""
    found = [_count(scene, rng), _presence(scene, rng)]
    alone = [s for s in scene.shapes if _count_of(scene, s.name) == 1]
    if alone:
        shape = alone[rng.integers(len(alone))]
        found.append(Asked("colour", f"What colour is the {shape.name}?", shape.colour))
    placed = [s for s in alone if _clearly_placed(scene, s)]
    if placed:
        shape = placed[rng.integers(len(placed))]
        found.append(Asked("place", f"Where is the {shape.name}?", PLACES[place(*shares(scene, shape.box))]))
    colours = [s.colour for s in scene.shapes]
    single = [s for s in scene.shapes if colours.count(s.colour) == 1]
    if single:
        shape = single[rng.integers(len(single))]
        found.append(Asked("shape", f"What shape is the {shape.colour} object?", shape.name))
    if scene.number:
        found.append(Asked("number", "What number is written?", scene.number.text))
    return [found[i] for i in rng.permutation(len(found))]


def _count_of(scene: Scene, name: str) -> int:
    return sum(s.name == name for s in scene.shapes)


def counts(scene: Scene) -> list[Asked]:
    """Of each shape that is there."""
    names = sorted({s.name for s in scene.shapes})
    return [Asked("count", f"How many {plural(name)} are there?", str(_count_of(scene, name))) for name in names]


def _count(scene: Scene, rng: np.random.Generator) -> Asked:
    """Mostly of a shape that is there."""
    there = sorted({s.name for s in scene.shapes}, key=lambda n: -_count_of(scene, n))
    name = there[0] if there and rng.random() < 0.75 else str(rng.choice(SHAPES))
    return Asked("count", f"How many {plural(name)} are there?", str(_count_of(scene, name)))


def plural(shape: str) -> str:
    return "crosses" if shape == "cross" else shape + "s"


def shape_of(question: str) -> int:
    """Number of the shape that a question names, from 1 as `scenes.Labels.kind` counts them."""
    return next(i for i, name in enumerate(SHAPES, 1) if name in question.lower())


def _presence(scene: Scene, rng: np.random.Generator) -> Asked:
    """As often there as not; what is not there has its colour or its shape from something that is, as often as not."""
    there = {(s.colour, s.name) for s in scene.shapes}
    if there and rng.random() < 0.5:
        colour, name = sorted(there)[rng.integers(len(there))]
    else:
        colour, name = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
        if there and rng.random() < 0.6:
            near = sorted(there)[rng.integers(len(there))]
            colour, name = (near[0], name) if rng.random() < 0.5 else (colour, near[1])
    article = "an" if colour == "orange" else "a"
    return Asked("presence", f"Is there {article} {colour} {name}?", "yes" if (colour, name) in there else "no")


def _clearly_placed(scene: Scene, shape: Shape) -> bool:
    """Not within 4 % of a line between two of the nine places."""
    return all(abs(share - line) > 0.04 for share in shares(scene, shape.box) for line in (1 / 3, 2 / 3))


def absent(scene: Scene, rng: np.random.Generator) -> list[Asked]:
    """Questions about what the scene has not."""
    found = []
    names = [s for s in SHAPES if _count_of(scene, s) == 0]
    if names:
        name = str(rng.choice(names))
        question = str(rng.choice([f"What colour is the {name}?", f"Where is the {name}?"]))
        found.append(Asked("other", question, f"There is no {name}."))
    if not scene.number:
        found.append(Asked("other", "What number is written?", "There is no number."))
    return found


def compared(same: bool) -> Asked:
    return Asked("same", "Are the two images the same?", "yes" if same else "no")


def spoken(asked: Asked, rng: np.random.Generator) -> Asked:
    """The same question, now and then as somebody in a hurry or across the ocean would type it."""
    question = asked.question
    if rng.random() < 0.25:
        question = question.replace("colour", "color")
    if rng.random() < 0.04:
        question = question.replace("crosses", "crosss")
    if rng.random() < 0.08:
        question = question.lower()
    if rng.random() < 0.06:
        question = question.rstrip("?")
    return Asked(asked.task, question, asked.answer)


# Text alone

_GREETINGS = (
    "Hello",
    "Hi",
    "Hey",
    "Good morning",
    "Good evening",
    "Hello there",
    "Hi there",
    "Good day",
    "Hey there",
    "Hello, how are you",
)
_ABILITY = (
    "What can you do?", "What are you able to do?", "Who are you?", "What are you?", "Help", "help", "What can I ask you?",
    "How can you help me?", "Describe the image.", "Describe this picture.", "What do you see?", "What is in this image?",
    "Describe the image", "What is in the picture?", "What's in this image?", "What is this?",
)  # fmt: skip


def _listed(words: str) -> list[str]:
    return words.split()


_NOUNS = _listed(
    "weather time world moon sun sea river mountain cat dog horse house car train book song story poem letter person "
    "man woman child friend king queen city country capital language word history science music film game food bread "
    "cheese apple tree flower bird fish computer program file network server phone money price market school teacher "
    "doctor war peace love dream road bridge door window table chair bottle cup knife hand head heart eye face body "
    "water fire earth air wind rain snow summer winter night day week month year hour minute sky cloud star sign "
    "planet ocean island forest desert engine bicycle airplane boat painting photo answer question problem idea plan "
    "reason law president government company team"
)
_VERBS = _listed(
    "make write find buy sell build break open close read draw eat drink cook drive fly swim run walk learn teach fix clean"
)
_ADJECTIVES = _listed(
    "big small old new good bad fast slow hot cold happy sad long short high low rich poor strong heavy famous best"
)
_NAMES = _listed(
    "France Japan Brazil London Paris Rome Einstein Newton Mozart Shakespeare Africa Europe Anna Peter Maria John Linux Python"
)
_UNKNOWN = (
    "What is the {adjective} {noun}?", "Who is {name}?", "Where is {name}?", "What is the capital of {name}?",
    "How do I {verb} a {noun}?", "Why is the {noun} so {adjective}?", "Write a {noun} about the {noun}.",
    "When was {name} born?",
    "Tell me about {name}.", "Tell me a {adjective} {noun}.", "Can you {verb} a {noun}?", "What does {noun} mean?",
    "Is the {noun} {adjective}?", "How old is {name}?", "How {adjective} is the {noun}?", "What is {number} plus {number}?",
    "What is {number} times {number}?", "Translate {noun} into the language of {name}.", "Which {noun} is the {adjective}?",
    "Who {verb}s the {noun}?", "Give me a {noun} to {verb}.", "Should I {verb} the {noun}?", "I want to {verb} a {noun}.",
    "{verb} the {noun}", "The {noun} is {adjective}.", "What is the {noun} of the {noun}?", "Do you {verb} {noun}s?",
    "How many {noun}s are in the {noun}?", "What time is it in {name}?", "Do you like {noun}s?", "Where can I {verb} a {noun}?",
    "What happened in {number}?", "Explain the {noun} to a {noun}.", "Why do people {verb} {noun}s?", "{noun} {noun} {verb}",
    "What colour is the {noun}?", "Where is the {noun}?", "Is there a {adjective} {noun}?", "What is the name of the {noun}?",
)  # fmt: skip
_TEXT_ONLY = "There is no image."


def small_talk(rng: np.random.Generator) -> Asked:
    """A question that no image is needed for, or that nothing helps with."""
    kind = rng.random()
    if kind < 0.2:
        end = str(rng.choice(["", "!", ".", "?"]))
        return Asked("other", str(rng.choice(_GREETINGS)) + end, GREETING)
    if kind < 0.4:
        return Asked("other", str(rng.choice(_ABILITY)), ABILITIES)
    if kind < 0.5:
        letters = list(string.ascii_lowercase + "   ")
        return Asked("other", "".join(rng.choice(letters, rng.integers(3, 40))).strip() + str(rng.choice(["", "?"])), UNKNOWN)
    question = str(rng.choice(_UNKNOWN))
    for slot, choices in (("noun", _NOUNS), ("verb", _VERBS), ("adjective", _ADJECTIVES), ("name", _NAMES)):
        while f"{{{slot}}}" in question:
            question = question.replace(f"{{{slot}}}", str(rng.choice(choices)), 1)
    while "{number}" in question:
        question = question.replace("{number}", str(rng.integers(1, 2000)), 1)
    return Asked("other", question, UNKNOWN)


def blind(rng: np.random.Generator) -> Asked:
    """A question about an image where there is none."""
    name, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
    asked = str(
        rng.choice([
            f"What colour is the {name}?", f"What shape is the {colour} object?", f"How many {plural(name)} are there?",
            f"Where is the {name}?", "What number is written?", f"Is there a {colour} {name}?", "Are the two images the same?",
        ])
    )  # fmt: skip
    return Asked("other", asked, _TEXT_ONLY)


SYSTEM = (
    "You are a helpful assistant.",
    "You are a helpful assistant",
    "Answer briefly.",
    "Answer in one word.",
    "You are a vision model.",
)


# The tokenizer


def _corpus() -> Iterator[str]:
    rng = np.random.default_rng(0)
    for _ in range(40):
        for name in SHAPES:
            for colour in COLOURS:
                yield f"What colour is the {name}? What color is the {name}? Is there a {colour} {name}?"
                yield f"Is there an orange {name}? What shape is the {colour} object? How many {plural(name)} are there?"
                yield f"Where is the {name}? There is no {name}."
                yield "What number is written? Are the two images the same? yes no There is no number. user assistant system"
        yield from (
            *PLACES,
            *COLOURS,
            *SHAPES,
            *SYSTEM,
            ABILITIES,
            GREETING,
            UNKNOWN,
            _TEXT_ONLY,
            "yes",
            "no",
            "user",
            "assistant",
            "system",
        )
    for _ in range(4000):
        yield small_talk(rng).question


class Words:
    """Byte-level BPE: any text can be written, the questions above in few tokens, digits one by one."""

    def __init__(self) -> None:
        self._tokenizer = Tokenizer(models.BPE())
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False),
        ])  # fmt: skip
        self._tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=1024,
            special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        self._tokenizer.train_from_iterator(_corpus(), trainer)

    @property
    def size(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids)))

    def conversation(self, turns: Sequence[Asked], opening: str) -> tuple[list[int], list[int]]:
        """Tokens, and of each the one that is to follow it where that is the model's to say, else −100.

        `opening` stands before the first question, in the same turn.
        """
        ids: list[int] = []
        told: list[int] = []
        for i, turn in enumerate(turns):
            start = opening if i == 0 else "\n<|im_start|>user\n"
            ask = self.encode(f"{start}{turn.question}<|im_end|>\n<|im_start|>assistant\n")
            say = self.encode(f"{turn.answer}<|im_end|>")
            ids += ask + say
            told += [-100] * (len(ask) - 1) + say + [-100]
        return ids, told

    def save(self, folder: Path) -> None:
        self._tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
        described = {
            "backend": "tokenizers",
            "eos_token": SPECIAL[EOS],
            "pad_token": SPECIAL[PAD],
            "extra_special_tokens": list(SPECIAL[1:]),
            "model_max_length": 8192,
            "tokenizer_class": "TokenizersBackend",
        }
        write_json(folder / "tokenizer_config.json", described)

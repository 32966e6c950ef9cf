"""Questions that need no image, or that no image answers."""

import string

import numpy as np

from demo.scenes.scene import COLOURS, SHAPES
from demo.text.questions import Question, plural

UNKNOWN_ANSWER = "I don't know."
ABILITIES_ANSWER = "I can name the colour, shape and place of objects, count them, read a number and compare two images."
GREETING_ANSWER = "Hello! Show me an image with shapes or a number and ask about it."
NO_IMAGE_ANSWER = "There is no image."
DESCRIPTION_ANSWER = "I can read, count and compare objects."
"""The answer to open questions about an image. No answer to a question of a task has its tokens, but for the full stop."""
DESCRIPTION_QUESTIONS = (
    "Describe the image.", "Describe the image", "Describe this image.", "Describe the picture.", "Describe this picture.",
    "Describe the image in detail.", "Describe this image in detail.", "Describe the image briefly.", "Describe both images.",
    "Describe the two images.", "Describe what you see.", "Describe", "What do you see?", "What do you see",
    "What do you see in this image?", "What do you see in the image?",
)  # fmt: skip
"""Open questions about images, all with "Describe" or "see", which no question of a task has."""
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant",
    "Answer briefly.",
    "Answer in one word.",
    "You are a vision model.",
)

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
_ABILITY_QUESTIONS = (
    "What can you do?", "What are you able to do?", "Who are you?", "What are you?", "Help", "help", "What can I ask you?",
    "How can you help me?", "Describe the image.", "Describe this picture.", "What do you see?", "What is in this image?",
    "Describe the image", "What is in the picture?", "What's in this image?", "What is this?",
)  # fmt: skip


def _split(words: str) -> list[str]:
    return words.split()


_NOUNS = _split(
    "weather time world moon sun sea river mountain cat dog horse house car train book song story poem letter person "
    "man woman child friend king queen city country capital language word history science music film game food bread "
    "cheese apple tree flower bird fish computer program file network server phone money price market school teacher "
    "doctor war peace love dream road bridge door window table chair bottle cup knife hand head heart eye face body "
    "water fire earth air wind rain snow summer winter night day week month year hour minute sky cloud star sign "
    "planet ocean island forest desert engine bicycle airplane boat painting photo answer question problem idea plan "
    "reason law president government company team"
)
_VERBS = _split(
    "make write find buy sell build break open close read draw eat drink cook drive fly swim run walk learn teach fix clean"
)
_ADJECTIVES = _split(
    "big small old new good bad fast slow hot cold happy sad long short high low rich poor strong heavy famous best"
)
_NAMES = _split(
    "France Japan Brazil London Paris Rome Einstein Newton Mozart Shakespeare Africa Europe Anna Peter Maria John Linux Python"
)
_UNKNOWN_QUESTIONS = (
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


def small_talk_question(rng: np.random.Generator) -> Question:
    """Return a greeting, a question about abilities, random letters, or a question the model cannot answer."""
    kind = rng.random()
    if kind < 0.2:
        end = str(rng.choice(["", "!", ".", "?"]))
        return Question("other", str(rng.choice(_GREETINGS)) + end, GREETING_ANSWER)
    if kind < 0.4:
        return Question("other", str(rng.choice(_ABILITY_QUESTIONS)), ABILITIES_ANSWER)
    if kind < 0.5:
        letters = list(string.ascii_lowercase + "   ")
        text = "".join(rng.choice(letters, rng.integers(3, 40))).strip() + str(rng.choice(["", "?"]))
        return Question("other", text, UNKNOWN_ANSWER)
    text = str(rng.choice(_UNKNOWN_QUESTIONS))
    for slot, choices in (("noun", _NOUNS), ("verb", _VERBS), ("adjective", _ADJECTIVES), ("name", _NAMES)):
        while f"{{{slot}}}" in text:
            text = text.replace(f"{{{slot}}}", str(rng.choice(choices)), 1)
    while "{number}" in text:
        text = text.replace("{number}", str(rng.integers(1, 2000)), 1)
    return Question("other", text, UNKNOWN_ANSWER)


def missing_image_question(rng: np.random.Generator) -> Question:
    """Return a question about an image, for a conversation that has none."""
    name, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
    text = str(
        rng.choice([
            f"What colour is the {name}?", f"What shape is the {colour} object?", f"How many {plural(name)} are there?",
            f"Where is the {name}?", "What number is written?", f"Is there a {colour} {name}?", "Are the two images the same?",
        ])
    )  # fmt: skip
    return Question("other", text, NO_IMAGE_ANSWER)

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from demo import scenes
from demo.scenes import COLOURS, SHAPES, Scene, Style
from demo.words import EOS, IMAGE_TOKEN, SPECIAL, Asked, Words, absent, blind, compared, questions, small_talk, spoken

ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng([11, *seed])


@pytest.fixture(scope="module")
def found() -> list[tuple[Scene, list[Asked]]]:
    made = []
    for i in range(500):
        scene = scenes.scene(rng(i), Style())
        made.append((scene, questions(scene, rng(i, 1))))
    return made


def truth(scene: Scene, question: str) -> str:
    """The answer by other means than the module's own. Raises where the question has no single one."""
    if question == "What number is written?":
        assert scene.number
        return scene.number.text
    if name := re.fullmatch(r"How many (\w+) are there\?", question):
        singular = next(s for s in SHAPES if name[1] in (f"{s}s", f"{s}es"))
        return str(Counter(s.name for s in scene.shapes)[singular])
    if said := re.fullmatch(r"Is there an? (\w+) (\w+)\?", question):
        assert ("Is there an " in question) == said[1].startswith("o")
        return "yes" if any((s.colour, s.name) == (said[1], said[2]) for s in scene.shapes) else "no"
    if colour := re.fullmatch(r"What shape is the (\w+) object\?", question):
        (shape,) = (s for s in scene.shapes if s.colour == colour[1])
        return shape.name
    name = re.fullmatch(r"(?:What colour|Where) is the (\w+)\?", question)
    assert name, question
    (shape,) = (s for s in scene.shapes if s.name == name[1])
    return shape.colour if "colour" in question else thirds(scene, shape)


def thirds(scene: Scene, shape: scenes.Shape) -> str:
    x, y = (shape.box[0] + shape.box[2]) * 3 // (2 * scene.width), (shape.box[1] + shape.box[3]) * 3 // (2 * scene.height)
    return f"{ROWS[int(y)]} {COLUMNS[int(x)]}".strip() or "center"


def test_answers_agree_with_the_scene(found: list[tuple[Scene, list[Asked]]]) -> None:
    for scene, asked in found:
        for one in asked:
            assert one.answer == truth(scene, one.question), (one, scene)


def test_every_task_is_asked_once_of_a_scene_that_can_answer_it(found: list[tuple[Scene, list[Asked]]]) -> None:
    times = Counter(one.task for _, asked in found for one in asked)
    assert set(times) == {"colour", "shape", "count", "place", "presence", "number"}
    assert min(times.values()) > 100
    for scene, asked in found:
        tasks = Counter(one.task for one in asked)
        assert max(tasks.values()) == 1
        assert {"count", "presence"} <= set(tasks)
        assert ("number" in tasks) == (scene.number is not None)
        assert ("colour" in tasks) == (1 in Counter(s.name for s in scene.shapes).values())
        assert ("shape" in tasks) == (1 in Counter(s.colour for s in scene.shapes).values())


def test_no_answer_can_be_guessed_by_always_saying_the_same(found: list[tuple[Scene, list[Asked]]]) -> None:
    for task, most in (("presence", 0.62), ("colour", 0.3), ("shape", 0.3), ("place", 0.3), ("count", 0.5), ("number", 0.05)):
        answers = Counter(one.answer for _, asked in found for one in asked if one.task == task)
        assert max(answers.values()) / answers.total() < most, answers.most_common(3)


def test_places_near_a_line_are_not_asked_about(found: list[tuple[Scene, list[Asked]]]) -> None:
    for scene, asked in found:
        for one in asked:
            if one.task == "place":
                (shape,) = (s for s in scene.shapes if s.name in one.question)
                for share in scenes.shares(scene, shape.box):
                    assert min(abs(share - 1 / 3), abs(share - 2 / 3)) > 0.04


def test_what_is_absent_is_absent(found: list[tuple[Scene, list[Asked]]]) -> None:
    seen = 0
    for i, (scene, _) in enumerate(found[:100]):
        for one in absent(scene, rng(i)):
            assert one.task == "other"
            thing = one.answer.removeprefix("There is no ").removesuffix(".")
            assert scene.number is None if thing == "number" else thing not in {s.name for s in scene.shapes}
            assert thing in one.question
            seen += 1
    assert seen > 50


def test_the_same_seed_asks_the_same() -> None:
    scene = scenes.scene(rng(3), Style())
    assert questions(scene, rng(4)) == questions(scene, rng(4))
    assert small_talk(rng(5)) == small_talk(rng(5))
    assert [compared(True).answer, compared(False).answer] == ["yes", "no"]


def test_how_it_is_said_changes_no_answer() -> None:
    asked = Asked("colour", "What colour is the cross?", "red")
    said = [spoken(asked, rng(i)) for i in range(300)]
    assert {(one.task, one.answer) for one in said} == {("colour", "red")}
    plain = {one.question.lower().rstrip("?").replace("color", "colour") for one in said}
    assert plain == {"what colour is the cross"}
    assert len({one.question for one in said}) >= 4


def test_small_talk_fills_all_its_slots() -> None:
    for i in range(300):
        for one in (small_talk(rng(i)), blind(rng(i))):
            assert one.question
            assert not set("{}") & set(one.question), one.question
            assert one.answer


# The tokenizer


@pytest.mark.parametrize(
    "text", ["0", "7", "42", "4071", "9999", "1000", "How many in 2024?", "user\n305<|im_end|>", "a1b22 333"]
)
def test_digits_are_one_token_each(words: Words, text: str) -> None:
    tokens = [words.decode([token]) for token in words.encode(text)]
    assert [t for t in tokens if any(c.isdigit() for c in t)] == [c for c in text if c.isdigit()]


@pytest.mark.parametrize(
    "text",
    [
        "What colour is the circle?", "", " ", "  two  spaces ", "line\nline\r\n\ttab", "Größe, façade, naïve", "你是书生·万象",
        "😀\u200d👩", "0123456789" * 20, "'s 't don't I'm", "\ud7ff\ue000\U0010ffff",
        "\x00\x1f\x7f", "ﷺ \u202e", "<|im_star|> <img"
    ],
)  # fmt: skip
def test_any_text_round_trips(words: Words, text: str) -> None:
    assert words.decode(words.encode(text)) == text


def test_questions_and_answers_are_short(words: Words) -> None:
    for colour in COLOURS:
        assert len(words.encode(colour)) <= 2
    for text in ("What colour is the diamond?", "How many triangles are there?", "What number is written?"):
        assert len(words.encode(text)) <= 8
    assert words.size == 1024


@pytest.mark.parametrize(("number", "token"), list(enumerate(SPECIAL)))
def test_special_tokens_have_their_numbers(words: Words, number: int, token: str) -> None:
    assert words.encode(f"a{token}b") == [*words.encode("a"), number, *words.encode("b")]


def test_two_tokenizers_are_the_same(words: Words, tmp_path: Path) -> None:
    for name, one in (("a", words), ("b", Words())):
        (tmp_path / name).mkdir()
        one.save(tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.fixture(scope="module")
def saved(words: Words, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What an engine makes of the saved files."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words.save(folder)
    return AutoTokenizer.from_pretrained(folder)


def rendered(saved: Any, messages: list[dict[str, Any]], asks: bool = True) -> str:
    return str(saved.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks))


def test_the_saved_tokenizer_is_the_one_of_training(words: Words, saved: Any) -> None:
    for text in ("<|im_start|>user\nHow many stars? 12<|im_end|>\n", "你好 😀", "".join(SPECIAL)):
        assert saved(text, add_special_tokens=False)["input_ids"] == words.encode(text)
        assert saved(text)["input_ids"] == words.encode(text)
    assert saved.eos_token_id == EOS
    assert saved.convert_tokens_to_ids("<IMG_CONTEXT>") == IMAGE_TOKEN


TURNS = {
    "one": [Asked("colour", "What colour is the star?", "blue")],
    "digits": [Asked("number", "What number is written?", "4071"), Asked("count", "How many crosses are there?", "3")],
    "three": [Asked("x", "hello", "Hello!"), Asked("x", "Where is the circle? ", "top left"), Asked("x", " 1 + 1", "no")],
    "odd": [Asked("x", "ünï\n\ncode 😀", " spaces "), Asked("x", "?", "a\nb")],
}  # fmt: skip


@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)
@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("system", ["", "Answer briefly."])
def test_a_conversation_is_tokenized_as_the_template_renders_it(
    words: Words, saved: Any, turns: list[Asked], images: int, system: str
) -> None:
    """Piece by piece as training does it, and all at once as the engine does it."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for i, turn in enumerate(turns):
        parts = [{"type": "image"}] * (images if i == 0 else 0) + [{"type": "text", "text": turn.question}]
        messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": turn.answer}]
    whole = rendered(saved, messages, asks=False).removesuffix("\n").replace("<image>", "<img><IMG_CONTEXT></img>")
    opening = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    opening += "<|im_start|>user\n"
    if not images:
        ids = words.conversation(turns, opening)[0]
    else:
        between = [*words.encode("</img>\n<img>"), IMAGE_TOKEN] * (images - 1)
        prefix = [*words.encode(f"{opening}<img>"), IMAGE_TOKEN, *between, *words.encode("</img>")]
        ids = prefix + words.conversation(turns, "\n")[0]
    assert ids == words.encode(whole)


@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)
def test_only_answers_and_their_ends_are_to_be_said(words: Words, turns: list[Asked]) -> None:
    ids, told = words.conversation(turns, "\n")
    assert len(ids) == len(told)
    said = [token for token in told if token != -100]
    expected: list[int] = []
    for turn in turns:
        expected += [*words.encode(turn.answer), EOS]
    assert said == expected
    assert all(after == token for token, after in zip(told, ids[1:], strict=False) if token != -100)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (("text",), "Q"), (("image", "text"), "<image>\nQ"), (("text", "image"), "<image>\nQ"),
        (("image", "text", "image"), "<image>\n<image>\nQ"), (("text", "image", "text"), "<image>\nQQ"),
        (("image",), "<image>\n"),
    ],
)  # fmt: skip
def test_images_stand_first_whatever_the_order_of_parts(saved: Any, kinds: tuple[str, ...], expected: str) -> None:
    parts = [{"type": "text", "text": "Q"} if kind == "text" else {"type": "image"} for kind in kinds]
    assert rendered(saved, [{"role": "user", "content": parts}]) == (
        f"<|im_start|>user\n{expected}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_string_is_as_good_as_a_text_part(saved: Any) -> None:
    parts = [{"type": "text", "text": "Hello"}]
    said, written = ([{"role": "user", "content": content}] for content in (parts, "Hello"))
    assert rendered(saved, said) == rendered(saved, written)

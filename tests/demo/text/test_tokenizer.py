from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from demo.scenes.scene import COLOURS
from demo.text.questions import Question
from demo.text.tokenizer import EOS_ID, IMAGE_TOKEN_ID, SPECIAL_TOKENS, DemoTokenizer


@pytest.mark.parametrize(
    "text", ["0", "7", "42", "4071", "9999", "1000", "How many in 2024?", "user\n305<|im_end|>", "a1b22 333"]
)
def test_each_digit_is_one_token(tokenizer: DemoTokenizer, text: str) -> None:
    tokens = [tokenizer.decode([token]) for token in tokenizer.encode(text)]
    assert [t for t in tokens if any(c.isdigit() for c in t)] == [c for c in text if c.isdigit()]


@pytest.mark.parametrize(
    "text",
    [
        "What colour is the circle?", "", " ", "  two  spaces ", "line\nline\r\n\ttab", "Größe, façade, naïve", "你是书生·万象",
        "😀\u200d👩", "0123456789" * 20, "'s 't don't I'm", "\ud7ff\ue000\U0010ffff",
        "\x00\x1f\x7f", "ﷺ \u202e", "<|im_star|> <img"
    ],
)  # fmt: skip
def test_any_text_round_trips(tokenizer: DemoTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_questions_and_answers_have_few_tokens(tokenizer: DemoTokenizer) -> None:
    for colour in COLOURS:
        assert len(tokenizer.encode(colour)) <= 2
    for text in ("What colour is the diamond?", "How many triangles are there?", "What number is written?"):
        assert len(tokenizer.encode(text)) <= 8
    assert tokenizer.size == 1024


@pytest.mark.parametrize(("number", "token"), list(enumerate(SPECIAL_TOKENS)))
def test_special_tokens_have_fixed_ids(tokenizer: DemoTokenizer, number: int, token: str) -> None:
    assert tokenizer.encode(f"a{token}b") == [*tokenizer.encode("a"), number, *tokenizer.encode("b")]


def test_two_tokenizers_are_equal(tokenizer: DemoTokenizer, tmp_path: Path) -> None:
    for name, each in (("a", tokenizer), ("b", DemoTokenizer())):
        (tmp_path / name).mkdir()
        each.save(tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.fixture(scope="module")
def saved(tokenizer: DemoTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tokenizer as an engine loads it from the saved files."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return AutoTokenizer.from_pretrained(folder)


def rendered(saved: Any, messages: list[dict[str, Any]], generation_prompt: bool = True) -> str:
    return str(saved.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt))


def test_saved_tokenizer_encodes_as_in_training(tokenizer: DemoTokenizer, saved: Any) -> None:
    for text in ("<|im_start|>user\nHow many stars? 12<|im_end|>\n", "你好 😀", "".join(SPECIAL_TOKENS)):
        assert saved(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
        assert saved(text)["input_ids"] == tokenizer.encode(text)
    assert saved.eos_token_id == EOS_ID
    assert saved.convert_tokens_to_ids("<IMG_CONTEXT>") == IMAGE_TOKEN_ID


TURNS = {
    "one": [Question("colour", "What colour is the star?", "blue")],
    "digits": [Question("number", "What number is written?", "4071"), Question("count", "How many crosses are there?", "3")],
    "three": [
        Question("x", "hello", "Hello!"),
        Question("x", "Where is the circle? ", "top left"), Question("x", " 1 + 1", "no"),
    ],
    "odd": [Question("x", "ünï\n\ncode 😀", " spaces "), Question("x", "?", "a\nb")],
}  # fmt: skip


@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)
@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("system", ["", "Answer briefly."])
def test_conversation_ids_equal_those_of_the_rendered_template(
    tokenizer: DemoTokenizer, saved: Any, turns: list[Question], images: int, system: str
) -> None:
    """Training encodes a conversation in pieces, the engine in one call."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for i, turn in enumerate(turns):
        parts = [{"type": "image"}] * (images if i == 0 else 0) + [{"type": "text", "text": turn.text}]
        messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": turn.answer}]
    whole = rendered(saved, messages, generation_prompt=False).removesuffix("\n").replace("<image>", "<img><IMG_CONTEXT></img>")
    opening = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    opening += "<|im_start|>user\n"
    if not images:
        ids = tokenizer.encode_conversation(turns, opening)[0]
    else:
        between = [*tokenizer.encode("</img>\n<img>"), IMAGE_TOKEN_ID] * (images - 1)
        prefix = [*tokenizer.encode(f"{opening}<img>"), IMAGE_TOKEN_ID, *between, *tokenizer.encode("</img>")]
        ids = prefix + tokenizer.encode_conversation(turns, "\n")[0]
    assert ids == tokenizer.encode(whole)


@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)
def test_labels_are_the_answers_and_their_end_tokens(tokenizer: DemoTokenizer, turns: list[Question]) -> None:
    ids, labels = tokenizer.encode_conversation(turns, "\n")
    assert len(ids) == len(labels)
    answer_ids = [token for token in labels if token != -100]
    expected: list[int] = []
    for turn in turns:
        expected += [*tokenizer.encode(turn.answer), EOS_ID]
    assert answer_ids == expected
    assert all(after == token for token, after in zip(labels, ids[1:], strict=False) if token != -100)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ("Q", "Q"), ("I Q", "I\nQ"), ("I I Q", "I\nI\nQ"), ("I", "I\n"), ("A B", "AB"), ("", ""),
        ("A I B I C", "AI\nBI\nC"), ("Frame1: I Frame2: I Q", "Frame1:I\nFrame2:I\nQ"), ("A I B", "AI\nB"),
        ("I A I", "I\nAI\n"), ("A I B I", "AI\nBI\n"), ("Frame1: I", "Frame1:I\n"),
    ],
)  # fmt: skip
def test_parts_keep_their_order(saved: Any, parts: str, expected: str) -> None:
    """I is an image, V a video, all else a text."""
    assert rendered_parts(saved, parts) == expected


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ("Q I", "I\nQ"), ("Q I I", "I\nI\nQ"), ("Q V", "V\nQ"), ("Q Frame1: I Frame2: I", "Frame1:I\nFrame2:I\nQ"),
    ],
)  # fmt: skip
def test_a_question_before_all_images_follows_them(saved: Any, parts: str, expected: str) -> None:
    """The model was trained on images first."""
    assert rendered_parts(saved, parts) == expected


def rendered_parts(saved: Any, parts: str) -> str:
    kinds = {"I": "image", "V": "video"}
    content = [{"type": kinds[part]} if part in kinds else {"type": "text", "text": part} for part in parts.split()]
    whole = rendered(saved, [{"role": "user", "content": content}])
    text = whole.removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n<|im_start|>assistant\n")
    return text.replace("<image>", "I").replace("<video>", "V")


def test_string_content_equals_a_text_part(saved: Any) -> None:
    parts = [{"type": "text", "text": "Hello"}]
    from_parts, from_string = ([{"role": "user", "content": content}] for content in (parts, "Hello"))
    assert rendered(saved, from_parts) == rendered(saved, from_string)

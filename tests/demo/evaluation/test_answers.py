import json
from dataclasses import replace
from pathlib import Path

import pytest

from demo.evaluation.plan import ROUTER_MODES, SERVER_DEFAULT, QuestionGroup
from tests.demo.evaluation.fake_gateway import SCENE, FakeGateway, ask_groups, make_groups, question_text


@pytest.mark.parametrize(
    ("answer", "correct"),
    [("12", True), (" 12\n", True), ("12.", False), ("1 2", False), ("", False), ("twelve", False), ("012", False)],
)
def test_an_answer_is_correct_if_it_is_the_expected_text(
    gateway: FakeGateway, tmp_path: Path, answer: str, correct: bool
) -> None:
    gateway.answer = lambda _: answer
    (record,) = ask_groups(gateway, make_groups(1, ("How many?", "12")), tmp_path / "a")
    assert record.is_correct == correct
    assert record.answer == answer


def test_stored_answers_are_not_requested_again(gateway: FakeGateway, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "answers"
    gateway.answer = lambda question: question
    first = ask_groups(gateway, make_groups(2, ("a", "a"), ("b", "z")), file)
    gateway.bodies.clear()
    more_groups = make_groups(3, ("a", "a"), ("b", "z"), ("c", "c"))
    more = ask_groups(gateway, more_groups, file)
    assert sorted(question_text(body) for body in gateway.bodies) == ["a", "b", "c", "c", "c"]
    assert set(first) < set(more)
    assert len(more) == 9
    gateway.bodies.clear()
    assert set(ask_groups(gateway, more_groups, file)) == set(more)
    assert gateway.bodies == []


@pytest.mark.parametrize("change", ["image", "expected", "model", "setting"])
def test_a_change_of_the_request_makes_a_new_one(gateway: FakeGateway, tmp_path: Path, change: str) -> None:
    file = tmp_path / "a"
    (before,) = ask_groups(gateway, make_groups(1, ("a", "1")), file)
    settings = ROUTER_MODES[:1] if change == "setting" else (SERVER_DEFAULT,)
    groups = make_groups(1, ("a", "2" if change == "expected" else "1"), settings=settings)
    if change == "image":
        groups = [QuestionGroup("router", 0, groups[0].questions, (replace(SCENE, seed=1),))]
    if change == "model":
        line = json.loads(file.read_text())
        file.write_text(json.dumps({**line, "model": "another"}) + "\n")
    gateway.bodies.clear()
    (after,) = ask_groups(gateway, groups, file)
    assert len(gateway.bodies) == 1
    assert len(file.read_text().splitlines()) == 2
    assert (before == after) == (change == "model")


@pytest.mark.parametrize("incomplete", ['{"name": "router/0', '{"name": "ü'.encode()[:-1], b"\x00\x00"])
def test_an_incomplete_last_line_is_removed(gateway: FakeGateway, tmp_path: Path, incomplete: str | bytes) -> None:
    file = tmp_path / "a"
    ask_groups(gateway, make_groups(2, ("a", "1")), file)
    complete = file.read_bytes()
    file.write_bytes(complete + (incomplete.encode() if isinstance(incomplete, str) else incomplete))
    gateway.bodies.clear()
    assert len(ask_groups(gateway, make_groups(3, ("a", "1")), file)) == 3
    assert len(gateway.bodies) == 1
    assert file.read_bytes().startswith(complete)
    assert len([json.loads(line) for line in file.read_bytes().splitlines()]) == 3

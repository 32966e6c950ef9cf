from pathlib import Path

import pytest
from aiohttp import web

from demo.evaluation import client
from demo.evaluation.client import EvaluationError
from demo.evaluation.plan import ROUTER_MODES, THRESHOLDS, QuestionGroup
from demo.evaluation.scores import setting_scores
from demo.text.questions import Question
from tests.demo.evaluation.fake_gateway import SCENE, FakeGateway, ask_groups, make_groups, question_text


def test_requests_are_greedy_with_images_before_the_text(gateway: FakeGateway, tmp_path: Path) -> None:
    groups = [
        QuestionGroup("text", 0, (Question("small talk", "Hello", "yes"),)),
        QuestionGroup("trained pairs", 0, (Question("same", "Same?", "yes"),), (SCENE, SCENE)),
        QuestionGroup(
            "router", 0, (Question("count", "How many?", "1"),), (SCENE,), settings=(ROUTER_MODES[0], THRESHOLDS[-1])
        ),
    ]
    ask_groups(gateway, groups, tmp_path / "a", concurrency=1)
    text, pair, off, thresholds = gateway.bodies
    for body in gateway.bodies:
        assert body["temperature"] == 0
        assert body["model"] == "tiny"
    assert text["messages"] == [{"role": "user", "content": "Hello"}]
    assert [part["type"] for part in pair["messages"][0]["content"]] == ["image_url", "image_url", "text"]
    assert "vir" not in text
    assert "vir" not in pair
    assert off["vir"] == {"mode": "off"}
    assert thresholds["vir"] == {"mode": "auto", "relative_threshold": 0.8, "absolute_threshold": 0.5}


def test_all_questions_are_asked_and_scored(gateway: FakeGateway, tmp_path: Path) -> None:
    gateway.answer = lambda question: {"a": "1", "b": "2", "c": "x"}[question]
    groups = make_groups(6, ("a", "1"), ("b", "2"), ("c", "3"), settings=ROUTER_MODES)
    records = ask_groups(gateway, groups, tmp_path / "a", concurrency=4)
    assert len(records) == len(gateway.bodies) == 54
    assert 2 <= gateway.max_in_flight <= 4
    settings = setting_scores(records, ROUTER_MODES)["settings"]
    assert [setting["token_share"] for setting in settings] == [1.0, 0.75, 0.25]  # auto compresses one of three tiles
    assert [setting["images"] for setting in settings] == [6, 6, 6]
    for setting in settings:
        assert setting["tasks"]["all"] == setting["tasks"]["count"]
        assert setting["tasks"]["all"]["n"] == 18
        assert setting["tasks"]["all"]["correct"] == 12


def test_questions_about_one_image_are_sent_one_after_another(gateway: FakeGateway, tmp_path: Path) -> None:
    ask_groups(gateway, make_groups(1, *((str(i), "") for i in range(6))), tmp_path / "a", concurrency=4)
    assert gateway.max_in_flight == 1
    assert [question_text(body) for body in gateway.bodies] == [str(i) for i in range(6)]


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_retried(gateway: FakeGateway, tmp_path: Path, status: int) -> None:
    gateway.failures = [web.Response(status=status, headers={"Retry-After": "0"}), web.Response(status=status)]
    assert len(ask_groups(gateway, make_groups(1, ("a", "yes")), tmp_path / "a")) == 1
    assert len(gateway.bodies) == 3


def test_a_server_without_room_is_asked_until_it_has_some(
    gateway: FakeGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.failures = [web.Response(status=429, headers={"Retry-After": "soon"}) for _ in range(20)]
    assert len(ask_groups(gateway, make_groups(1, ("a", "yes")), tmp_path / "a")) == 1
    assert len(gateway.bodies) == 21
    monkeypatch.setattr(client, "BUSY_SECONDS", 0.0)
    gateway.failures = [web.Response(status=429, text="no room") for _ in range(20)]
    with pytest.raises(EvaluationError, match="429: no room"):
        ask_groups(gateway, make_groups(2, ("a", "yes")), tmp_path / "a")


@pytest.mark.parametrize(("status", "attempts"), [(400, 1), (500, 1), (503, 3)])
def test_a_persistent_error_ends_the_run_and_keeps_the_answers(
    gateway: FakeGateway, tmp_path: Path, status: int, attempts: int
) -> None:
    ask_groups(gateway, make_groups(1, ("a", "yes")), tmp_path / "a")
    gateway.bodies.clear()
    gateway.failures = [web.Response(status=status, text="no such thing") for _ in range(9)]
    with pytest.raises(EvaluationError, match=f"{status}: no such thing"):
        ask_groups(gateway, make_groups(2, ("a", "yes")), tmp_path / "a")
    assert len(gateway.bodies) == attempts
    assert len((tmp_path / "a").read_text().splitlines()) == 1


def test_a_server_that_ignores_vir_is_an_error(gateway: FakeGateway, tmp_path: Path) -> None:
    gateway.applies_vir = False
    with pytest.raises(EvaluationError, match="ignores vir"):
        ask_groups(gateway, make_groups(1, ("a", "yes"), settings=ROUTER_MODES), tmp_path / "a")
    assert (tmp_path / "a").read_text().count('"setting": "off"') == 1

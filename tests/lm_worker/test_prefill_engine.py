"""vLLM's real engine prefills requests in part: exact tokens whenever the embeddings arrive, and nothing is left behind."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.lm_worker.prefill_engine import CASES, FRAMES, SCENARIOS, THREE_IMAGES, TWO_IMAGES

_TIMEOUT_SECONDS = 900
_NOTHING = {"requests": 0, "blocks": 0, "pins": 0, "partial": 0}
_GOLDEN = THREE_IMAGES["greedy_token_ids"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results of all scenarios, which one engine runs one after the other."""
    folder = tmp_path_factory.mktemp("prefill")
    command = [sys.executable, "-m", "tests.lm_worker.prefill_engine", str(folder)]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    lines = [json.loads(line.removeprefix("RESULT ")) for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert {line["name"] for line in lines} == set(SCENARIOS), run.stderr[-3000:]
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_is_left_behind(results: dict[str, dict[str, Any]], name: str) -> None:
    assert "error" not in results[name], results[name]
    assert results[name]["leftovers"] == _NOTHING


@pytest.mark.parametrize(("name", "case"), [("two images", TWO_IMAGES), ("three images", THREE_IMAGES)])
def test_images_are_prefilled_as_they_arrive(results: dict[str, dict[str, Any]], name: str, case: dict[str, Any]) -> None:
    result = results[name]
    assert result["computed"] == result["offsets"], "after each delivery, all tokens in front of the next image"
    assert result["tokens"] == [case["greedy_token_ids"]]


def test_images_behind_a_missing_one_wait(results: dict[str, dict[str, Any]]) -> None:
    result = results["last first"]
    assert len(set(result["computed"])) == 1
    assert result["tokens"] == [_GOLDEN]


def test_frames_of_a_video_are_prefilled_one_by_one(results: dict[str, dict[str, Any]]) -> None:
    result = results["video"]
    assert len(set(result["computed"])) == FRAMES - 1
    assert result["tokens"] == result["expected"]
    assert len(result["texts"]) == 4
    assert all(len(tokens) == 16 for tokens in result["texts"]), "requests beside it are served meanwhile"


def test_the_first_images_may_be_in_the_prefix_cache(results: dict[str, dict[str, Any]]) -> None:
    result = results["prefix hit"]
    assert result["computed"][1:] == result["offsets"][9:], "frame 8 has arrived, and so on"
    assert result["tokens"] == result["expected"]


def test_a_request_may_be_preempted_while_it_waits(results: dict[str, dict[str, Any]]) -> None:
    result = results["preempted while waiting"]
    assert (result["preemptions"], result["lost"]) == (1, 0)
    assert result["before"] == result["after"]
    assert result["tokens"] == [_GOLDEN]


def test_the_rest_of_a_request_gets_its_kv_cache(results: dict[str, dict[str, Any]]) -> None:
    result = results["cache full"]
    assert result["preemptions"] == 1, "of the request that came later"
    assert result["tokens"] == [_GOLDEN, *result["other_alone"]]


def test_beyond_the_share_requests_wait_for_their_last_image(results: dict[str, dict[str, Any]]) -> None:
    result = results["share used up"]
    assert result["computed"][0] > result["computed"][1] == 0
    assert result["text"] == [CASES[13]["greedy_token_ids"]], "a complete request passes both"
    assert result["tokens"][0] == _GOLDEN
    assert len(result["tokens"][1]) == 16


def test_a_request_may_be_aborted_at_any_time(results: dict[str, dict[str, Any]]) -> None:
    assert results["aborted"]["left"] == 4 * [_NOTHING]

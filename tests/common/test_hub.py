"""Checkpoints by id: the cache of huggingface_hub, and its real client against a local stand-in for the hub."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from common.checkpoint import INDEX, Checkpoint, CheckpointError, open_checkpoint
from common.hub import find_checkpoint, parse_repository, pinned, served_name
from common.hub_download import Activity
from tests.hub import BOTH, COMMIT, ID, LANGUAGE, VISION, fill_cache, hub_server, split_checkpoint
from tests.ports import free_port

GOLDEN = Path(__file__).parents[1] / "data/golden/flash-qwen3/checkpoint"
MODEL = Path(ID)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return split_checkpoint(GOLDEN, tmp_path_factory.mktemp("hub") / "repository")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, for this process and its children, and no hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def served(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    with hub_server(repository) as (url, requested):
        monkeypatch.setenv("HF_ENDPOINT", url)
        yield requested


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("org/name", ("org/name", None)),
        ("OpenGVLab/InternVL3_5-8B-Flash@main", ("OpenGVLab/InternVL3_5-8B-Flash", "main")),
        ("org/name@refs/pr/1", ("org/name", "refs/pr/1")),
        *((path, None) for path in ("name", "/org/name", "../name", "~/name", "a/b/c", "org/na me", "org/")),
    ],
)
def test_what_has_the_form_of_an_id(model: str, expected: tuple[str, str | None] | None) -> None:
    repository = parse_repository(Path(model))
    assert (repository and (repository.id, repository.revision)) == expected


def test_a_folder_of_that_name_is_a_folder(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / ID)
    assert find_checkpoint(MODEL, "vision").path == tmp_path / ID
    assert served_name(MODEL) == "tiny-model"


def test_the_served_name_is_the_id_without_the_revision(tmp_path: Path) -> None:
    assert served_name(MODEL) == served_name(Path(f"{ID}@v1")) == ID
    assert served_name(tmp_path / "x/../y") == "y"


@pytest.mark.parametrize("model", [ID, f"{ID}@main", f"{ID}@{COMMIT}"])
def test_a_cached_checkpoint_needs_no_hub(cache: Path, repository: Path, model: str) -> None:
    snapshot = fill_cache(cache, repository)
    assert find_checkpoint(Path(model), "vision", "language").path == snapshot


def test_a_half_needs_only_its_own_shards_and_both_have_the_same_fingerprint(cache: Path, repository: Path) -> None:
    fill_cache(cache, repository, LANGUAGE)
    vision = find_checkpoint(MODEL, "vision")
    assert set(vision.vision_tensors) == set(open_checkpoint(GOLDEN).vision_tensors)
    fingerprint = vision.fingerprint
    shutil.rmtree(cache)
    fill_cache(cache, repository, VISION)
    language = find_checkpoint(MODEL, "language")
    language.check_language_files()
    assert language.lacks_files
    assert language.fingerprint == fingerprint
    with pytest.raises(CheckpointError, match=VISION):
        _ = language.vision_tensors


def test_the_fingerprint_of_a_snapshot_depends_on_its_commit(cache: Path, repository: Path) -> None:
    snapshot = fill_cache(cache, repository)
    other = snapshot.rename(snapshot.with_name(COMMIT[::-1]))
    assert open_checkpoint(other).fingerprint != find_in(snapshot, repository, cache).fingerprint


def find_in(snapshot: Path, repository: Path, cache: Path) -> Checkpoint:
    shutil.rmtree(cache)
    fill_cache(cache, repository)
    return open_checkpoint(snapshot)


@pytest.mark.parametrize("half", ["vision", "language"])
def test_only_the_files_of_a_half_are_downloaded(served: list[str], half: str, cache: Path) -> None:
    checkpoint = find_checkpoint(MODEL, half)  # type: ignore[arg-type]
    assert {name for name in served if name.endswith(".safetensors")} == {BOTH, VISION if half == "vision" else LANGUAGE}
    assert not [name for name in served if name.endswith(".py")]
    assert ("tokenizer.json" in served) == ("chat_template.jinja" in served) == (half == "language")
    assert checkpoint.path == cache / "models--org--tiny-model/snapshots" / COMMIT
    sent = len(served)
    assert find_checkpoint(MODEL, half).path == checkpoint.path  # type: ignore[arg-type]
    assert len(served) == sent, "the second time all files are in the cache"


def test_a_download_is_completed_with_the_other_half(served: list[str]) -> None:
    find_checkpoint(MODEL, "vision")
    served.clear()
    assert not find_checkpoint(MODEL, "language", "vision").lacks_files
    assert {name for name in served if name.endswith(".safetensors")} == {LANGUAGE}


def test_a_description_and_dummy_weights_need_no_weights(served: list[str]) -> None:
    description = find_checkpoint(MODEL)
    assert set(served) == {"config.json", "preprocessor_config.json"}
    assert description.as_json()["fingerprint"] == find_checkpoint(MODEL, "vision", weights=False).fingerprint
    find_checkpoint(MODEL, "language", weights=False)
    assert "tokenizer.json" in served
    assert not [name for name in served if name.endswith(".safetensors") or name == INDEX]


def test_another_process_gets_the_same_commit(served: list[str]) -> None:
    model = pinned(MODEL, find_checkpoint(MODEL, "vision"))
    assert str(model) == f"{ID}@{COMMIT}"
    served.clear()
    find_checkpoint(model, "vision")
    assert served == []
    assert pinned(GOLDEN, open_checkpoint(GOLDEN)) == GOLDEN


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("missing", "has no such repository, or it is private and HF_TOKEN is unset or has no access"),
        ("gated", f"it is gated: accept its terms at http.*/{ID}, then set HF_TOKEN or run hf auth login"),
        ("unavailable", "answered with status 503"),
        ("silent", r"no answer from http.* \(ReadTimeout"),
        ("stall", "sent nothing for 2 s"),
    ],
)
def test_a_failed_download_is_one_line_that_says_why(
    repository: Path, monkeypatch: pytest.MonkeyPatch, fault: str, reason: str
) -> None:
    with hub_server(repository, fault) as (url, _):
        monkeypatch.setenv("HF_ENDPOINT", url)
        with pytest.raises(CheckpointError, match=reason) as caught:
            find_checkpoint(
                MODEL, "vision", answer_seconds=0.5 if fault == "silent" else 60, stall_seconds=2 if fault == "stall" else 60
            )
    check_line(caught.value)


def check_line(error: CheckpointError, model: str = ID) -> None:
    assert "\n" not in str(error)
    assert str(error).startswith(f"{model!r} is no folder")
    assert str(error).endswith(f"hf download {ID}")


def test_files_that_another_process_downloads_are_activity(tmp_path: Path) -> None:
    """Such a process holds a lock, and this one receives nothing itself."""
    activity = Activity(tmp_path / "blobs")
    assert not activity.is_new()
    (tmp_path / "blobs").mkdir()
    file = tmp_path / "blobs/a.incomplete"
    file.write_bytes(b"a")
    assert activity.is_new()
    file.write_bytes(b"ab")
    assert activity.is_new()
    file.rename(tmp_path / "blobs/a")
    assert activity.is_new()
    assert not activity.is_new()


def test_a_child_that_is_killed_is_one_line(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    with pytest.raises(CheckpointError, match="the download ended with status 1: start again to resume it"):
        find_checkpoint(MODEL)


def test_a_refused_connection_is_one_line(cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no answer from http://127\.0\.0\.1:\d+ \(ConnectError.*refused") as caught:
        find_checkpoint(MODEL)
    check_line(caught.value)


def test_offline_mode_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set") as caught:
        find_checkpoint(MODEL)
    check_line(caught.value)


def test_an_unknown_revision_is_one_line(served: list[str]) -> None:
    with pytest.raises(CheckpointError, match="has no revision 'absent'.*--revision absent$"):
        find_checkpoint(Path(f"{ID}@absent"))


def test_a_repository_without_safetensors_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r").mkdir()
    shutil.copy(GOLDEN / "config.json", tmp_path / "r")
    with hub_server(tmp_path / "r") as (url, _):
        monkeypatch.setenv("HF_ENDPOINT", url)
        with pytest.raises(CheckpointError, match="has no model.safetensors: expected safetensors files"):
            find_checkpoint(MODEL, "language")
        (tmp_path / "r/config.json").rename(tmp_path / "r/readme.json")
        shutil.rmtree(tmp_path / "cache")
        with pytest.raises(CheckpointError, match="has no config.json"):
            find_checkpoint(MODEL)

"""The home folder of a process that has none to write to."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from dvd import caches
from dvd.caches import NoWritableFolderError, use_writable_home

ARBITRARY_UID = 12345


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that cannot be written, even by root."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    create = tempfile.TemporaryFile

    def deny(dir: str) -> Any:
        if Path(dir).is_relative_to(folder):
            raise PermissionError(13, "Permission denied", dir)
        return create(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", deny)
    return folder


def changed(**variables: str) -> dict[str, str]:
    variables.setdefault("USER", "someone")
    use_writable_home(variables)
    return {name: value for name, value in variables.items() if name != "USER"}


def test_a_writable_home_stays(tmp_path: Path) -> None:
    assert changed(HOME=str(tmp_path)) == {"HOME": str(tmp_path)}
    missing = str(tmp_path / "a/b")
    assert changed(HOME=missing, XDG_CACHE_HOME=missing) == {"HOME": missing, "XDG_CACHE_HOME": missing}, "can be created"


@pytest.mark.parametrize("name", ["", "missing/below"])
def test_another_home_is_in_the_folder_for_temporary_files(read_only: Path, temporary: Path, name: str) -> None:
    home = temporary / f"dvd-home-{os.getuid()}"
    assert changed(HOME=str(read_only / name), XDG_CACHE_HOME=str(read_only), XDG_CONFIG_HOME="") == {"HOME": str(home)}
    assert home.stat().st_mode & 0o777 == 0o700
    assert changed(HOME=str(read_only)) == {"HOME": str(home)}, "the next start finds the same caches"


def test_a_home_that_even_root_cannot_create(temporary: Path) -> None:
    assert changed(HOME="/proc/home") == {"HOME": str(temporary / f"dvd-home-{os.getuid()}")}


def test_models_in_a_home_that_is_read_only_are_still_found(read_only: Path, temporary: Path) -> None:
    models = read_only / ".cache/huggingface"
    models.mkdir(parents=True)
    assert changed(HOME=str(read_only))["HF_HOME"] == str(models)
    assert changed(HOME=str(read_only), HF_HOME="/models")["HF_HOME"] == "/models"


def test_a_folder_that_others_can_write_is_not_used(read_only: Path, temporary: Path) -> None:
    (temporary / f"dvd-home-{os.getuid()}").mkdir()
    (temporary / f"dvd-home-{os.getuid()}").chmod(0o777)
    assert changed(HOME=str(read_only))["HOME"] not in (str(read_only), str(temporary / f"dvd-home-{os.getuid()}"))


def test_no_writable_folder_at_all_is_one_line(read_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", fail)
    with pytest.raises(
        NoWritableFolderError, match="^no writable folder for the caches of libraries: HOME is .*mount"
    ) as caught:
        changed(HOME=str(read_only))
    assert "\n" not in str(caught.value)


def test_a_user_without_a_name_gets_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "_has_name", lambda: False)
    for given, user in (({}, f"uid-{os.getuid()}"), ({"LOGNAME": "someone"}, None)):
        variables = {"HOME": str(tmp_path), **given}
        use_writable_home(variables)
        assert variables.get("USER") == user


SCRIPT = """
import getpass, os, pwd, sys, tempfile
from pathlib import Path
from dvd.caches import use_writable_home
os.setgroups([]); os.setgid({uid}); os.setuid({uid})
use_writable_home(os.environ)
print(getpass.getuser(), Path.home().stat().st_uid, os.access(Path.home(), os.W_OK))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("home", [None, "/", "/nonexistent"])
def test_an_arbitrary_user_id(home: str | None) -> None:
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONDONTWRITEBYTECODE": "1"}
    variables |= {"HOME": home} if home else {}
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        command = [sys.executable, "-c", SCRIPT.format(uid=ARBITRARY_UID)]
        result = subprocess.run(command, env=variables | {"TMPDIR": folder}, capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == (f"uid-{ARBITRARY_UID} {ARBITRARY_UID} True\n", "")

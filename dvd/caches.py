"""A home folder for the caches of libraries, where the process has none that it can write to.

torch, Triton, vLLM, FlashInfer, numba, matplotlib and Hugging Face's libraries write below the home folder, each at a place of
its own. A container with an arbitrary user id or a read-only file system often has no such folder.
"""

import os
import pwd
import stat
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

_USER_VARIABLES = ("LOGNAME", "USER", "LNAME", "USERNAME")
"""Where `getpass.getuser` looks for a name before it looks the user id up, which fails for an arbitrary one."""

_XDG_VARIABLES = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME")
"""Folders that libraries prefer to those in the home folder."""


class NoWritableFolderError(Exception):
    """Neither the home folder nor the folder for temporary files can be written. The message is one line."""


def use_writable_home(environment: MutableMapping[str, str]) -> None:
    """Set HOME to a folder for temporary files if the home folder cannot be written, and name the user if nothing does.

    Models that Hugging Face's libraries have stored in the original home folder are still found.

    Args:
        environment: variables of this process, which are changed.

    Raises:
        NoWritableFolderError: there is no writable folder at all.
    """
    if not _has_name() and not any(environment.get(name) for name in _USER_VARIABLES):
        environment["USER"] = f"uid-{os.getuid()}"
    for variable in _XDG_VARIABLES:
        if not _is_writable(environment.get(variable, "")):
            environment.pop(variable, None)
    home = environment.get("HOME") or _home_of_user()
    if _is_writable(home):
        environment["HOME"] = home
        return
    if os.access(models := os.path.join(home, ".cache/huggingface"), os.R_OK | os.X_OK):
        environment.setdefault("HF_HOME", models)
    environment["HOME"] = _temporary_home(home)


def _has_name() -> bool:
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return True


def _home_of_user() -> str:
    return pwd.getpwuid(os.getuid()).pw_dir if _has_name() else ""


def _is_writable(folder: str) -> bool:
    """Return whether a folder can be written, or created."""
    while folder not in ("", "/") and not os.path.exists(folder):
        folder = os.path.dirname(folder)
    try:
        tempfile.TemporaryFile(dir=folder or "/").close()  # os.access answers yes to root even on /proc
    except OSError:
        return False
    return bool(folder)


def _temporary_home(home: str) -> str:
    """Return this user's own folder in the folder for temporary files; it is created, and used again by the next start."""
    try:
        folder = Path(tempfile.gettempdir()) / f"dvd-home-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if status.st_uid == os.getuid() and status.st_mode == stat.S_IFDIR | 0o700:
            return str(folder)
        return tempfile.mkdtemp(prefix="dvd-home-")  # another user has taken the name
    except OSError as error:
        raise NoWritableFolderError(
            f"no writable folder for the caches of libraries: HOME is {home or 'unset'}, and there is no folder for temporary "
            f"files ({error.strerror}); mount a writable folder at /tmp, or set HOME or TMPDIR to one"
        ) from None

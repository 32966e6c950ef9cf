"""Downloads one repository: the child process of `common/hub.py`, `python -m common.hub_download DOWNLOAD`.

It writes lines of JSON to stdout: `{"progress": TEXT}` where stderr is no terminal, at the end `{"folder": PATH}` or
`{"error": TEXT}`. It is a process of its own because huggingface_hub retries for minutes, in threads that only the end of their
process ends.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import HfApi, constants, errors, snapshot_download
from huggingface_hub.utils import tqdm

from common.checkpoint import CheckpointError
from common.hub import IGNORED_FILES, Download, Repository, small_files, weight_files

_POLL_SECONDS = 0.2
_REPORT_INTERVAL_SECONDS = 10.0
_MEGABYTE = 1_000_000


class _Progress(tqdm):  # type: ignore[misc]
    """A progress bar of huggingface_hub that also counts where nothing is drawn.

    Attributes:
        updates: how often any bar has advanced.
        of_bytes: the bar that counts the bytes of all files of this snapshot.
    """

    updates: ClassVar[int] = 0
    of_bytes: ClassVar["_Progress | None"] = None

    def __init__(self, *args: Any, **options: Any) -> None:
        self._received = 0.0
        if options.get("name") == "huggingface_hub.snapshot_download":
            _Progress.of_bytes = self
        super().__init__(*args, **{"disable": None, **options})  # None: draw on a terminal alone

    def update(self, n: float | None = 1) -> bool | None:
        """Advance the bar by `n`."""
        _Progress.updates += 1
        self._received += n or 0
        shown: bool | None = super().update(n)
        return shown

    def text(self) -> str:
        """Return how many bytes have arrived, of how many."""
        return f"{self._received / _MEGABYTE:,.0f} of {(self.total or 0) / _MEGABYTE:,.0f} MB"


class Activity:
    """Whether a repository's files are arriving in the cache, also if another process downloads them and this one waits."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last = self._state()

    def is_new(self) -> bool:
        """Return whether anything has arrived since the last call."""
        state, self._last = self._last, self._state()
        return state != self._last

    def _state(self) -> tuple[int, list[tuple[str, int]]]:
        files = list[tuple[str, int]]()
        if self._folder.is_dir():
            with os.scandir(self._folder) as entries:
                files = sorted((entry.name, _size(entry)) for entry in entries)
        return _Progress.updates, files


def _size(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat().st_size
    except FileNotFoundError:  # complete, and renamed meanwhile
        return 0


class _Worker(threading.Thread):
    """The thread that downloads. `result` is the line to print when it has ended."""

    def __init__(self, download: Download) -> None:
        super().__init__(daemon=True)
        self._download = download
        self.result: dict[str, str] = {"error": "the download ended without a result"}

    def run(self) -> None:
        """Download, and set `result`."""
        try:
            self.result = {"folder": str(_fetch(self._download))}
        except CheckpointError as error:
            self.result = {"error": str(error)}
        except Exception as error:  # whatever it is, the caller gets one line
            self.result = {"error": failure(self._download, error)}


def main(argument: str) -> dict[str, str]:
    """Run one download. Returns the last line to print."""
    download = Download(**json.loads(argument))
    worker = _Worker(download)
    worker.start()
    activity = Activity(Path(constants.HF_HUB_CACHE, f"models--{download.id.replace('/', '--')}", "blobs"))
    last_activity = last_report = time.monotonic()
    while worker.is_alive():
        worker.join(_POLL_SECONDS)
        now = time.monotonic()
        if activity.is_new():
            last_activity = now
        elif now - last_activity > download.stall_seconds:
            return {"error": _message(download, f"{constants.ENDPOINT} sent nothing for {download.stall_seconds:g} s")}
        if now - last_report > _REPORT_INTERVAL_SECONDS and not sys.stderr.isatty():
            last_report = now
            progress = "asking the hub" if _Progress.of_bytes is None else _Progress.of_bytes.text()
            _print({"progress": f"downloading {download.id}: {progress}"})
    return worker.result


def _fetch(download: Download) -> Path:
    """Download the configuration, and then the weights that it and the index name. Returns the snapshot's folder."""
    api = HfApi()
    # the only request of huggingface_hub that has a timeout and no retries: it finds out what is wrong, if anything is
    api.model_info(download.id, revision=download.revision, timeout=download.answer_seconds)
    revision = api.resolve_revision(download.id, revision=download.revision)
    folder = _snapshot(download, revision, small_files(download))
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{download.id!r} on {constants.ENDPOINT} has no config.json: is it the repository of a model?")
    weights = weight_files(download, folder)
    if weights:
        _snapshot(download, revision, weights)
    if missing := [name for name in weights if not (folder / name).is_file()]:
        raise CheckpointError(f"{download.id!r} on {constants.ENDPOINT} has no {missing[0]}: expected safetensors files")
    return folder


def _snapshot(download: Download, revision: str, patterns: list[str]) -> Path:
    return Path(
        snapshot_download(
            download.id, revision=revision, allow_patterns=patterns, ignore_patterns=list(IGNORED_FILES), tqdm_class=_Progress
        )
    )


def failure(download: Download, error: Exception) -> str:
    """Return one line that says why a download failed, and how to get the files otherwise."""
    return _message(download, _reason(download, error))


def _message(download: Download, reason: str) -> str:
    repository = Repository(download.id, download.revision)
    return (
        f"{str(repository)!r} is no folder, is not complete in the cache {constants.HF_HUB_CACHE}, and cannot be downloaded: "
        f"{reason}. To download it elsewhere or later: {repository.command}"
    )


def _reason(download: Download, error: BaseException) -> str:
    hub = constants.ENDPOINT
    match error:
        case errors.OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set"
        case errors.GatedRepoError():
            return f"it is gated: accept its terms at {hub}/{download.id}, then set HF_TOKEN or run hf auth login"
        case errors.RevisionNotFoundError():
            return f"it has no revision {download.revision!r} on {hub}"
        case errors.RepositoryNotFoundError():
            return f"{hub} has no such repository, or it is private and HF_TOKEN is unset or has no access"
        case errors.HfHubHTTPError():
            status = error.response.status_code
            return f"{hub} answered with status {status}" + (": is HF_TOKEN valid?" if status in (401, 403) else "")
        case errors.HFValidationError():
            return "the hub allows no such name"
        case errors.HTTPError():
            return f"no answer from {hub} ({type(error).__name__}: {_first_line(error)})"
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.RevisionResolutionError)) and error.__cause__ is not None:
        return _reason(download, error.__cause__)
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _print(line: dict[str, str]) -> None:
    print(json.dumps(line), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    sys.stdout = sys.stderr  # whatever else is printed is no line of ours
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which then ends this process
    _print(main(sys.argv[1]))
    os._exit(0)  # threads that still retry would delay the end

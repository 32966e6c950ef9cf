"""Finds the checkpoint that MODEL names: a folder, or a repository on Hugging Face's hub, `ORG/NAME[@REVISION]`.

A repository is taken from the local cache of huggingface_hub (HF_HOME, HF_HUB_CACHE). Files that it lacks are downloaded by a
child process (`common/hub_download.py`), those of the wanted halves alone: no process needs the other half, and none runs code
of a repository.
"""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from common.checkpoint import INDEX, Checkpoint, CheckpointError, open_checkpoint
from common.processes import die_with_parent

log = logging.getLogger(__name__)

Half = Literal["vision", "language"]
"""A part of the weights that a process loads by itself."""

_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", re.ASCII)
"""Repository and revision; the hub allows fewer."""

_DESCRIPTION_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
_TOKENIZER_FILES = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*",
                    "merges.txt", "chat_template*", "*.tiktoken")  # fmt: skip
IGNORED_FILES = ("*.py", "*/*")
"""Patterns of files that are never downloaded: code, and whatever lies in folders."""

_ANSWER_SECONDS = 10.0
# longer than a slow link needs for 10 MB, the unit in which progress is reported
_STALL_SECONDS = 60.0


@dataclass(frozen=True)
class Repository:
    """A repository on the hub.

    Attributes:
        id: `ORG/NAME`.
        revision: branch, tag or commit; None: the default branch.
    """

    id: str
    revision: str | None

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}" if self.revision else self.id

    @property
    def command(self) -> str:
        """The command line that downloads the repository."""
        return f"hf download {self.id}" + (f" --revision {self.revision}" if self.revision else "")


@dataclass(frozen=True)
class Download:
    """What `common/hub_download.py` has to do, as its only argument in JSON.

    Attributes:
        id: `ORG/NAME`.
        revision: branch, tag or commit; None: the default branch.
        halves: halves whose files are wanted; none: the configuration alone.
        weights: whether their weights are, too.
        answer_seconds: time in which the hub has to answer the first request.
        stall_seconds: time without a byte after which the download ends.
    """

    id: str
    revision: str | None
    halves: Sequence[Half]
    weights: bool
    answer_seconds: float
    stall_seconds: float


def find_checkpoint(
    model: Path,
    *halves: Half,
    weights: bool = True,
    answer_seconds: float = _ANSWER_SECONDS,
    stall_seconds: float = _STALL_SECONDS,
) -> Checkpoint:
    """Return the checkpoint that MODEL names, downloaded if need be.

    Args:
        model: folder, or `ORG/NAME[@REVISION]`.
        halves: halves whose files must be present, if it is a repository; none: the description alone.
        weights: whether their weights must be, too.
        answer_seconds: see `Download`.
        stall_seconds: see `Download`.

    Raises:
        CheckpointError: the message is one line that says why there is none.
    """
    repository = parse_repository(model)
    if repository is None:
        return open_checkpoint(model)
    download = Download(repository.id, repository.revision, halves, weights, answer_seconds, stall_seconds)
    return open_checkpoint(cached_snapshot(download) or _download(download))


def parse_repository(model: Path) -> Repository | None:
    """Return the repository that MODEL names, or None if it is the path of a folder."""
    match = _ID.fullmatch(str(model))
    return Repository(match[1], match[2]) if match and not model.exists() else None


def served_name(model: Path) -> str:
    """Return the name under which MODEL is served: `ORG/NAME`, or the folder's name."""
    repository = parse_repository(model)
    return repository.id if repository else model.expanduser().resolve().name


def pinned(model: Path, checkpoint: Checkpoint) -> Path:
    """Return MODEL such that another process opens the same commit, from the cache."""
    repository = parse_repository(model)
    return Path(f"{repository.id}@{checkpoint.commit}") if repository and checkpoint.commit else model


def small_files(download: Download) -> list[str]:
    """Return patterns of the files, weights excepted, that a download needs."""
    tokenizer = _TOKENIZER_FILES if "language" in download.halves else ()
    return [*_DESCRIPTION_FILES, *tokenizer, *([INDEX] if download.weights and download.halves else [])]


def weight_files(download: Download, folder: Path) -> list[str]:
    """Return the names of the weight files that a download needs, by the configuration and index in its folder."""
    if not download.weights or not download.halves:
        return []
    checkpoint = open_checkpoint(folder)
    files = {"vision": checkpoint.vision_files, "language": checkpoint.language_files}
    return sorted({file for half in download.halves for file in files[half]})


def cached_snapshot(download: Download) -> Path | None:
    """Return the folder in the cache that has every file that a download needs, or None. Does not use the network."""
    huggingface_hub = _huggingface_hub()
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                download.id, revision=download.revision, local_files_only=True, allow_patterns=small_files(download),
                ignore_patterns=list(IGNORED_FILES),
            )
        )  # fmt: skip
    except (OSError, ValueError):  # LocalEntryNotFoundError is an OSError
        return None
    if not (folder / "config.json").is_file():
        return None
    return folder if all((folder / name).is_file() for name in weight_files(download, folder)) else None


def _download(request: Download) -> Path:
    """Run the child process that downloads, log its progress, and return the snapshot's folder."""
    _huggingface_hub()
    log.info("%s is not complete in the cache of huggingface_hub: downloading it", request.id)
    command = [sys.executable, "-P", "-m", "common.hub_download", json.dumps(asdict(request))]
    environment = {"HF_HUB_VERBOSITY": "error", **os.environ}  # its warnings at every retry would hide the one line
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, preexec_fn=die_with_parent) as child:
        try:
            return _read_result(child)
        except KeyboardInterrupt:
            raise CheckpointError("the download was interrupted: start again to resume it") from None
        finally:
            child.kill()


def _read_result(child: "subprocess.Popen[str]") -> Path:
    """Read lines with one of the keys `progress`, `error` and `folder` until the result. Raises: `CheckpointError`."""
    assert child.stdout is not None
    for line in child.stdout:
        match json.loads(line):
            case {"progress": text}:
                log.info("%s", text)
            case {"folder": folder}:
                return Path(folder)
            case {"error": text}:
                raise CheckpointError(text)
    raise CheckpointError(f"the download ended with status {child.wait()}: start again to resume it")


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub  # here, not at import: half a second, and only a repository needs it
    except ImportError:
        raise CheckpointError(
            "a repository of Hugging Face's hub needs a package that is not installed here: pip install huggingface-hub"
        ) from None
    return huggingface_hub

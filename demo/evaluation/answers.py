"""The file of answers: every answer is stored as it arrives, so that an evaluation can be resumed."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from demo.evaluation.plan import PlannedRequest, QuestionGroup


@dataclass(frozen=True)
class AnswerRecord:
    """One line of the file.

    Attributes:
        name: Name of the planned request.
        tokens: Visual tokens of the images as the gateway reports them.
        uncompressed_tokens: Visual tokens without compression.
    """

    name: str
    model: str
    stream: str
    index: int
    setting: str
    task: str
    question: str
    expected: str
    answer: str
    tokens: int | None
    uncompressed_tokens: int

    @property
    def is_correct(self) -> bool:
        """Whether the answer is the expected text, ignoring surrounding white space."""
        return self.answer.strip() == self.expected


class AnswerFile:
    """The answers of one model. Opening the file removes an incomplete last line, left by a crash."""

    def __init__(self, file: Path, model: str) -> None:
        """Read the answers of `model`. Folder and file are created."""
        self._records: dict[str, AnswerRecord] = {}
        file.parent.mkdir(parents=True, exist_ok=True)
        content = file.read_bytes() if file.exists() else b""
        end = content.rfind(b"\n") + 1
        if end < len(content):
            os.truncate(file, end)
        for line in content[:end].splitlines():
            record = AnswerRecord(**json.loads(line))
            if record.model == model:
                self._records[record.name] = record
        self._file = file.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def __contains__(self, request: PlannedRequest) -> bool:
        return request.name in self._records

    def add(self, record: AnswerRecord) -> None:
        """Append an answer and flush it to the file."""
        self._records[record.name] = record
        self._file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
        self._file.flush()

    def records_of(self, groups: Iterable[QuestionGroup]) -> list[AnswerRecord]:
        """Return the stored answers to the questions of the groups, in order."""
        return [self._records[request.name] for group in groups for request in group.requests if request in self]

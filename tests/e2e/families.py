"""Checkpoints of every language model that a family uses, and a process that answers questions with each of them."""

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.e2e.serving import ROOT

IMAGE_FILES = ("square.png", "palette_512x512.png", "wide_1300x800.jpg")

CONTEXT_TOKEN = 5  # <IMG_CONTEXT>

QUESTIONS = [
    ["what is shown?"],
    ["square", "what is shown?"],
    ["palette_512x512", "what is shown?"],
    ["Image-1: ", "square", "Image-2: ", "palette_512x512", "compare"],
    ["Image-1: ", "palette_512x512", "Image-2: ", "square", "compare"],
    ["wide_1300x800", "what is shown?"],
    ["<image> or <IMG_CONTEXT>?", "square", "what is shown?"],
]
"""Content parts of a user message each; a part that is the name of an image file stands for the image."""


@dataclass(frozen=True)
class Family:
    """A checkpoint.

    Attributes:
        name: its name.
        options: options of `write_checkpoint`, or of `write_native_checkpoint` where `native`.
        native: whether it has transformers' layout.
        language_alone: whether vLLM gets it without the files that hold only vision tensors.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    native: bool = False
    language_alone: bool = False


FAMILIES = [
    Family("qwen2-text-template", {"language": "qwen2", "chat_template": "text"}),
    Family("qwen3-flash-6b", {"language": "qwen3", "flash": True, "tower": "6b", "shards": 8}, language_alone=True),
    Family("qwen3-moe-flash", {"language": "qwen3_moe", "flash": True}),
    Family("llama", {"language": "llama", "tower": "6b", "pixel_shuffle": "v1"}),
    Family("internlm2", {"language": "internlm2", "tower": "6b", "pixel_shuffle": "v1", "chat_template": "text"}),
    Family("internlm3", {"language": "internlm3"}),
    Family("phi3", {"language": "phi3", "select_layer": -2, "chat_template": "text"}),
    Family("gpt-oss", {"language": "gpt_oss"}),
    Family("native-qwen2", {"language": "qwen2"}, native=True),
    Family("native-qwen3", {"language": "qwen3", "tensor_names": "module"}, native=True),
]


@dataclass
class FamilyRun:
    """A running `tests.e2e.family_engine`, its folder and its log."""

    process: "subprocess.Popen[bytes]"
    folder: Path
    log: Path

    @classmethod
    def start(cls) -> "FamilyRun":
        """Starts the process and does not wait for it."""
        folder = Path(tempfile.mkdtemp(prefix="dvd-families-"))
        log = folder / "log"
        with log.open("wb") as file:
            command = [sys.executable, "-m", "tests.e2e.family_engine", str(folder)]
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        return cls(process, folder, log)

    def results(self, timeout_seconds: float) -> dict[str, dict[str, Any]]:
        """Waits until the process ends and returns its results by the family's name.

        A result has `rows` (visual tokens by image), `tokens`, `prompts` and `visual` (for each question the token ids of the
        answer, the length of the prompt, and its number of visual tokens), or `error`.
        """
        self.process.wait(timeout_seconds)
        lines = self.log.read_text(errors="replace").splitlines()
        results = [json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")]
        return {result["name"]: result for result in results}

    def stop(self) -> None:
        """Ends the process and removes its folder."""
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

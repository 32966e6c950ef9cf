"""Adapts checkpoints and the environment so that stock vLLM can serve as the colocated baseline of the benchmarks."""

import json
import shutil
from pathlib import Path

_HERE = Path(__file__).parent
TORCHVISION_SHIM = _HERE / "site"
"""Entry for PYTHONPATH: allows a CUDA build of torchvision with a CPU build of torch where no matching build exists."""


def copy_with_remote_code(checkpoint: Path, folder: Path) -> Path:
    """Copy a checkpoint to `folder` and add the configuration class that published checkpoints ship as remote code.

    Weights are linked, not copied. Returns the folder, which must not exist yet.
    """
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    shutil.copyfile(_HERE / "configuration.py", folder / "configuration_internvl_chat.py")
    config = json.loads((checkpoint / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder

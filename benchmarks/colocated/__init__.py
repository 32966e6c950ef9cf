"""What stock vLLM needs to serve our checkpoint beside us; used by nothing but the benchmarks."""

import json
import shutil
from pathlib import Path

_HERE = Path(__file__).parent
SITE = _HERE / "site"
"""For PYTHONPATH: lets a CUDA build of torchvision be imported beside a CPU build of torch, where there is no other."""


def copied(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint with the configuration class that published ones bring along, its weights linked."""
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    shutil.copyfile(_HERE / "configuration.py", folder / "configuration_internvl_chat.py")
    config = json.loads((checkpoint / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder

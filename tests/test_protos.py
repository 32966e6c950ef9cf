"""The committed stubs are those of the committed protos."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_stubs_are_up_to_date(tmp_path: Path) -> None:
    protos = sorted((ROOT / "protos").glob("*.proto"))
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", f"-Iprotos={ROOT / 'protos'}"),
            *(f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")),
            *map(str, protos),
        ],
        check=True,
    )
    made = sorted((tmp_path / "protos").iterdir())
    assert {file.name for file in made} == {file.name for file in (ROOT / "protos").glob("*_pb2*")}
    for file in made:
        assert file.read_text() == (ROOT / "protos" / file.name).read_text(), "run make protos"

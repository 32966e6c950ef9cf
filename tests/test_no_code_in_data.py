"""No shipped file runs code that it reads as data. Ruff's S rules report many such calls; noqa does not silence these."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("server", "vision_worker", "lm_worker", "common", "dvd", "protos")

FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "marshal",
    "shelve",
    "joblib",
    "jsonpickle",
    "telnetlib",
    "xml",
}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.tempnam", "tempfile.mktemp", "pty.spawn",
    "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell", "code.interact",
    "torch.load", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter", "numpy.load", "np.load",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all",
    "hashlib.md5", "hashlib.sha1", "ssl._create_unverified_context",
}  # fmt: skip
"""Functions that run what they are given, or protect nothing. `re.compile` and `torch.compile` are other functions."""

FORBIDDEN_ARGUMENTS = {
    "shell": True, "trust_remote_code": True, "allow_pickle": True, "weights_only": False, "verify": False, "ssl": False,
    "check_hostname": False, "verify_ssl": False, "autoescape": False,
}  # fmt: skip
FORBIDDEN_NAMES = {"CERT_NONE", "_create_unverified_context", "UnsafeLoader", "FullLoader"}
STARTS_A_PROGRAM = {"Popen", "run", "call", "check_call", "check_output", "create_subprocess_exec"}


def dotted(node: ast.expr) -> str:
    """Return `a.b.c` as it is written; an empty part for anything that is not a name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def offences(source: str) -> Iterator[str]:
    """Yield what a module does that it must not do."""
    tree = ast.parse(source)
    names = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module and not node.level
        for alias in node.names
    } | {
        alias.asname: alias.name
        for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names if alias.asname
    }  # fmt: skip
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                yield from (alias.name for alias in aliases if alias.name.split(".")[0] in FORBIDDEN_MODULES)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in FORBIDDEN_MODULES:
                yield module
            case ast.Call():
                yield from _call_offences(node, names)
            case ast.Attribute(attr=name) if name in FORBIDDEN_NAMES:
                yield name
            case ast.Assign(targets=[ast.Attribute(attr="check_hostname")], value=ast.Constant(value=False)):
                yield "check_hostname = False"


def _call_offences(call: ast.Call, names: dict[str, str]) -> Iterator[str]:
    first, _, rest = dotted(call.func).partition(".")
    name = f"{names.get(first, first)}{f'.{rest}' if rest else ''}"
    if name in FORBIDDEN_CALLS:
        yield f"{name}()"
    for keyword in call.keywords:
        expected = FORBIDDEN_ARGUMENTS.get(keyword.arg or "")
        if expected is not None and isinstance(keyword.value, ast.Constant) and keyword.value.value is expected:
            yield f"{keyword.arg}={expected}"
    if name.split(".")[-1] in STARTS_A_PROGRAM and name.startswith(("subprocess", "asyncio")) and call.args:
        program = call.args[0]
        if isinstance(program, ast.JoinedStr) or (name.startswith("subprocess") and isinstance(program, ast.Constant)):
            yield f"{name}() of a string"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_runs_data_as_code(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    found = [(str(file.relative_to(ROOT)), what) for file in files for what in offences(file.read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from cloudpickle import loads", "import dill as d", "import marshal", "import os; os.system(x)",
        "from os import system as s; s(x)", "import torch as t; t.load(f)", "import numpy as np; np.load(f)", "eval(x)",
        "exec(x)",
        "compile(x, '', 'exec')", "import yaml; yaml.load(x)", "from yaml import full_load as y; y(x)",
        "import subprocess; subprocess.run('ls')", "import subprocess; subprocess.Popen(f'ls {x}')", "f(shell=True)",
        "import tempfile; tempfile.mktemp()", "import hashlib as h; h.md5(x)", "import ssl; ssl._create_unverified_context()",
        "f(verify=False)", "context.check_hostname = False", "import ssl; c.verify_mode = ssl.CERT_NONE",
        "import asyncio; asyncio.create_subprocess_shell(x)", "load(weights_only=False)", "f(allow_pickle=True)",
        "f(trust_remote_code=True)",
    ],
)  # fmt: skip
def test_such_a_call_is_found(source: str) -> None:
    assert list(offences(source))


@pytest.mark.parametrize(
    "source",
    [
        "import re; re.compile(x)", "import torch; torch.compile(m)", "import yaml; yaml.safe_load(x)", "model.eval()",
        "import subprocess; subprocess.run(['ls'])", "import hashlib; hashlib.sha256(x)", "f(shell=False)", "f(verify=True)",
    ],
)  # fmt: skip
def test_harmless_neighbours_are_not_found(source: str) -> None:
    assert list(offences(source)) == []

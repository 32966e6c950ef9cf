"""What operators write: flags, variables, files of options and of plans. Errors are one line and name what is wrong."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from common.options import KNOWN_NAMES, PREFIX, ConfigError, effective_values, logging_options, read_options
from dvd.plan import file as plan_file
from tests.fuzz.strategies import damaged, json_values, near
from tests.option_classes import COMMANDS

NAMES = st.sampled_from(sorted(KNOWN_NAMES)) | st.text("abc_-", max_size=8)
VALUES = st.sampled_from(
    ["", "0", "1", "-1", "1e400", "nan", "true", "a:1", "unix:/x", "[::1]:5", "redis://:p@h", "{}", "[1", "é\n"]
) | (st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=12))
FLAGS = st.lists(st.builds(lambda name, value: f"--{name.replace('_', '-')}={value}", NAMES, VALUES) | VALUES, max_size=4)
FILES: Any = st.dictionaries(NAMES, VALUES | json_values, max_size=4)
EXAMPLE: Any = yaml.safe_load(plan_file.example())


@example("language", ["m"], {}, {"vllm": {"\ud800": 1}})
@example("gateway", [], {"\ud800": "1"}, {"api_key": "\ud800"})
@given(st.sampled_from(sorted(COMMANDS)), FLAGS, st.dictionaries(NAMES, VALUES, max_size=3), FILES)
def test_options_are_valid_or_the_error_is_one_line(
    tmp_path_factory: Any, command: str, flags: list[str], variables: dict[str, str], content: dict[str, Any]
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    file.write_text(json.dumps(content))
    environment = {f"{PREFIX}{name.upper()}": value for name, value in variables.items()} | {"DVD_CONFIG": str(file)}
    logging_options(flags, environment)  # never fails
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            options = read_options(COMMANDS[command], flags, environment)
    except ConfigError as error:
        assert "\n" not in str(error)
    except SystemExit as ended:
        assert ended.code == 0
    else:
        json.dumps(effective_values(options))


@given(
    damaged([b"port: 8000\nmodel: a\nvllm: {max-model-len: 5}\n", b"a: &a [*a]\n", b"!!python/object/apply:os.system [true]\n"])
)
def test_a_damaged_file_is_read_or_the_error_is_one_line(tmp_path_factory: Any, content: bytes) -> None:
    file: Path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    file.write_bytes(content)
    try:
        read_options(COMMANDS["gateway"], [], {"DVD_CONFIG": str(file)})
    except ConfigError as error:
        assert "\n" not in str(error)


@given(near(EXAMPLE).map(json.dumps) | damaged([plan_file.example().encode()]).map(lambda text: text.decode(errors="replace")))
@example(r'{"\ud800": 1}')
@example(r'{"costs": {"\ud800": 1}}')
def test_a_plan_is_read_or_the_error_is_one_line(text: str) -> None:
    try:
        plan = plan_file.read(text, {"load": {}, "limits": {}})
    except ValueError as error:
        assert "\n" not in str(error)
        assert 0 < len(str(error)) < 1000
    else:
        assert plan.load.kinds

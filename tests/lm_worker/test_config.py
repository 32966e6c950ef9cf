"""How a language worker's own arguments and vLLM's flags share a command line."""

from typing import Any

import pytest

from common.options import ConfigError, read_options
from dvd.up_config import UpOptions
from lm_worker import vllm_flags
from lm_worker.config import LanguageOptions, VllmOptions, all_vllm_flags, reject_own_flags, split_arguments


@pytest.mark.parametrize(
    ("arguments", "own", "vllm_flags"),
    [
        (["MODEL"], ["MODEL"], []),
        (["MODEL", "--"], ["MODEL"], []),
        (["MODEL", "--", "--dtype=float32", "--"], ["MODEL"], ["--dtype=float32", "--"]),
    ],
)
def test_arguments_after_the_first_double_dash_are_flags_of_vllm(
    arguments: list[str], own: list[str], vllm_flags: list[str]
) -> None:
    assert split_arguments(arguments) == (own, vllm_flags)


@pytest.mark.parametrize("flag", ["--port", "--port=1", "--limit_mm_per_prompt={}", "--uds=/s"])
def test_flags_that_the_worker_sets_itself_are_rejected(flag: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{flag.split('=')[0]} after -- is set by the language worker itself"):
        reject_own_flags(["--dtype=float32", flag])


@pytest.mark.parametrize("flag", ["--shutdown-timeout", "--shutdown_timeout=5"])
def test_vllms_own_time_to_stop_is_replaced(flag: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{flag.split('=')[0]} after -- is replaced by --shutdown-grace"):
        reject_own_flags([flag])


def test_other_flags_of_vllm_are_accepted() -> None:
    reject_own_flags(["--dtype=float32", "--max-model-len", "4096"])


@pytest.mark.parametrize("flag", ["--log-level=DEBUG", "--log_config_file", "--logging-config.formatter=json"])
def test_flags_about_logging_are_rejected(flag: str) -> None:
    with pytest.raises(ConfigError, match="use --log-level and --log-format$"):
        reject_own_flags([flag])


@pytest.mark.parametrize("flag", ["-h", "--help", "--help=all"])
def test_help_of_vllm_is_elsewhere(flag: str) -> None:
    with pytest.raises(ConfigError, match="after --: vllm serve --help=all lists vLLM's flags"):
        reject_own_flags([flag])


def flags(*words: str, options: type[VllmOptions] = LanguageOptions, vllm: dict[str, Any] | None = None) -> list[str]:
    return all_vllm_flags(read_options(options, ["m"], {}).model_copy(update={"vllm": vllm or {}}), words)


@pytest.mark.parametrize(
    "words",
    [
        ["--max-model-len", "4096", "--max_model_len=1k", "--no-enable-prefix-caching", "-tp", "2", "-tp=2", "-O3", "-O", "1"],
        ["--compilation-config.mode=none", "-cc.mode", "none", "--override-generation-config", '{"a": -1}', "--seed", "-1"],
        ["--enforce-eag", "--served-model-name", "a", "b"],
        ["--middleware", "-- not a flag"],
    ],
)
def test_flags_of_vllm_are_accepted_in_every_form(words: list[str]) -> None:
    assert flags(*words) == words


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        (
            "--no-such-vllm-flag",
            "unknown flag --no-such-vllm-flag after --, where vLLM's flags go: vllm serve --help=all lists them",
        ),
        (
            "--max-model-length=1",
            "unknown flag --max-model-length after --, where vLLM's flags go: did you mean --max-model-len?",
        ),
        ("--max_modal_len", "unknown flag --max_modal_len after --, where vLLM's flags go: did you mean --max-model-len?"),
        ("-xy", "unknown flag -xy after --"),
        ("--m", "unknown flag --m after --"),
        ("--sink-bytes=1", "--sink-bytes after -- is no flag of vLLM but of dvd language: give it before --"),
    ],
)
def test_an_unknown_flag_is_one_line_with_a_suggestion(word: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        flags("--dtype=float32", word)
    assert str(caught.value).startswith(hint)
    assert "\n" not in str(caught.value)


def test_dvd_up_names_itself() -> None:
    with pytest.raises(ConfigError, match="of dvd up: give it before --"):
        flags("--vision-workers=2", options=UpOptions)


def test_a_mapping_becomes_flags_before_those_of_the_command_line() -> None:
    values: dict[str, Any] = {
        "max_model_len": 4096, "enforce-eager": True, "enable_prefix_caching": False, "seed": None,
        "override_generation_config": {"a": 1}, "served_model_name": ["a", "b"], "allowed_origins": ["*"],
    }  # fmt: skip
    assert flags("--max-model-len=1", vllm=values) == [
        "--max-model-len=4096", "--enforce-eager", "--no-enable-prefix-caching", '--override-generation-config={"a": 1}',
        "--served-model-name", "a", "b", '--allowed-origins=["*"]', "--max-model-len=1",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["max_modal_len", "port"])
def test_a_wrong_name_in_the_mapping_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} after --"):
        flags(vllm={name: 1})


def test_the_list_of_flags_has_what_operators_use() -> None:
    assert {"--max-model-len", "--dtype", "--tensor-parallel-size", "-tp", "--no-enable-prefix-caching"} <= vllm_flags.known()

"""Options: precedence of the three sources, and errors that name the option, its value and what was expected."""

from pathlib import Path

import pytest

from common.options import KNOWN_NAMES, ConfigError, as_arguments, logging_options, read_options
from dvd.up_config import UpOptions
from server.config import GatewayOptions
from tests.option_classes import COMMANDS
from vision_worker.config import VisionOptions

WORKERS = ["--vision-workers=a:1,unix:/b", "--language-workers=c:3"]


def test_a_flag_overrides_a_variable_and_a_variable_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "dvd.yaml"
    file.write_text("port: 1\nhost: h\nmax_images: 3\nvision_dtype: float32\n")  # the last belongs to another command
    variables = {"DVD_CONFIG": str(file), "DVD_PORT": "2", "DVD_MAX_IMAGES": "4", "HOME": "/"}
    options = read_options(GatewayOptions, [*WORKERS, "--port", "5"], variables)
    assert (options.port, options.max_images, options.host) == (5, 4, "h")
    assert (options.vision_workers, options.language_workers) == (["a:1", "unix:/b"], ["c:3"])


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["--port=x"], {}, r"--port = 'x'"),
        (["--port=70000"], {}, "--port = '70000': expected at most 65535"),
        (["--port"], {}, "--port: expected one argument; see dvd gateway --help"),
        (["--prot=1"], {}, "unknown flag --prot: did you mean --port?"),
        (["--max-model-len=1"], {}, "unknown flag --max-model-len: dvd gateway --help lists the flags"),
        (["extra"], {}, "unexpected argument 'extra'; see dvd gateway --help"),
        ([], {"DVD_FOOBAR": "1"}, "unknown variable DVD_FOOBAR: no command has this option"),
        ([], {"DVD_PROT": "1"}, "unknown variable DVD_PROT: did you mean DVD_PORT"),
        (["--router-scope=tile"], {}, "--router-scope = 'tile': expected 'image' or 'request'"),
        (["--max-tiles=41"], {}, "--max-tiles = '41'"),
        (["--allow-vir=maybe"], {}, "--allow-vir = 'maybe': expected true or false"),
        (["--vir=on"], {}, "--vir = 'on'"),
        (["--vir-relative-threshold=1.5"], {}, "--vir-relative-threshold = '1.5'"),
        (["--vir-absolute-threshold=nan"], {}, "--vir-absolute-threshold = 'nan'"),
        ([], {"DVD_VIR_ABSOLUTE_THRESHOLD": "-0.1"}, "--vir-absolute-threshold = '-0.1'"),
        (
            ["--vir=all", "--vir-relative-threshold=0"],
            {},
            "--vir-relative-threshold = '0': thresholds require --vir=auto, not all",
        ),
        (["--vision-workers=nowhere"], {}, r"--vision-workers = 'nowhere': expected HOST:PORT, .*dns:NAME:PORT"),
        (["--vision-workers=a:1,dns:///vision:5"], {}, "--vision-workers = 'dns:///vision:5'"),
        (["--vision-workers=dns:a..b:5"], {}, "--vision-workers"),
        ([f"--language-workers=dns:{'a' * 64}:5"], {}, "--language-workers"),
        (["--language-workers=dns:vision"], {}, "--language-workers"),
        (["--language-workers=dns:vision:0"], {}, "--language-workers"),
        (["--language-workers=vision:65536"], {}, "--language-workers"),
        (["--fetch-user-agent=café"], {}, "--fetch-user-agent = 'café': invalid format .*printable ASCII"),
        (["--fetch-user-agent=a\r\nX-Evil: b"], {}, "--fetch-user-agent"),
        (["--fetch-user-agent="], {}, "--fetch-user-agent = ''"),
        ([], {"DVD_FETCH_USER_AGENT": "a" * 257}, "--fetch-user-agent"),
        (["--config=/nowhere.yaml"], {}, "cannot read --config /nowhere.yaml"),
    ],
)
def test_an_invalid_option_is_an_error_of_one_line(arguments: list[str], variables: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_options(GatewayOptions, [*WORKERS, *arguments], variables)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("prot: 1", "unknown key 'prot'.*did you mean port"), ("- 1", "mapping"), ("{", "cannot")]
)
def test_an_invalid_file_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_options(GatewayOptions, [*WORKERS, f"--config={tmp_path / 'f.yaml'}"], {})


@pytest.mark.parametrize(
    ("text", "vir", "thresholds"),
    [
        ("", "auto", (None, None)),
        ("vir: off", "off", (None, None)),  # false, to YAML
        ("vir: 'off'\nvir_relative_threshold: null", "off", (None, None)),
        ("vir: auto\nvir_relative_threshold: 0\nvir_absolute_threshold: 0.25", "auto", (0, 0.25)),
    ],
)
def test_router_options_of_a_file_reach_the_gateway(
    tmp_path: Path, text: str, vir: str, thresholds: tuple[float | None, float | None]
) -> None:
    (tmp_path / "f.yaml").write_text(text)
    up = read_options(UpOptions, ["m", f"--config={tmp_path / 'f.yaml'}"], {})
    arguments = as_arguments(up, GatewayOptions, vision_workers=["a:1"], language_workers=["b:1"])
    gateway = read_options(GatewayOptions, arguments, {})
    for options in (up, gateway):
        assert (options.vir, (options.vir_relative_threshold, options.vir_absolute_threshold)) == (vir, thresholds)


def test_every_form_of_worker_address_is_accepted() -> None:
    addresses = ["dns:vision:50051", "dns:vision.dvd.svc.cluster.local.:1", "vision:1", "[::1]:5", "unix:/a b", "dns:5"]
    options = read_options(GatewayOptions, ["--vision-workers=" + ",".join(addresses), "--language-workers=dns:language:2"], {})
    assert (options.vision_workers, options.language_workers) == (addresses, ["dns:language:2"])


def test_a_missing_model_is_an_error() -> None:
    with pytest.raises(ConfigError, match="missing MODEL"):
        read_options(VisionOptions, [], {})


def test_secrets_are_masked_and_never_become_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    secret = {"DVD_API_KEY": "hunter2"}
    with pytest.raises(SystemExit):
        read_options(GatewayOptions, [*WORKERS, "--print-config"], secret)
    assert "hunter2" not in capsys.readouterr().out
    options = read_options(GatewayOptions, WORKERS, secret)
    assert options.api_key is not None
    assert options.api_key.get_secret_value() == "hunter2"
    assert "hunter2" not in str(as_arguments(options, GatewayOptions)) + repr(options)


def test_a_secret_is_not_in_error_messages(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("api_key: [hunter2]")
    for arguments in (["--port=x"], [f"--config={tmp_path / 'f.yaml'}"]):
        with pytest.raises(ConfigError) as caught:
            read_options(
                GatewayOptions, [*WORKERS, *arguments], {} if "--config" in arguments[0] else {"DVD_API_KEY": "hunter2"}
            )
        assert "hunter2" not in str(caught.value)


def test_arguments_pass_options_on_to_a_child() -> None:
    up = read_options(UpOptions, ["m", "--max-batch-tiles=3", "--allow-private-images", "--sink-lease=2"], {})
    vision = read_options(VisionOptions, as_arguments(up, VisionOptions, listen="unix:/v"), {})
    assert (vision.model, vision.max_batch_tiles, vision.listen) == (Path("m"), 3, "unix:/v")
    gateway = as_arguments(up, GatewayOptions, vision_workers=["a:1"], language_workers=["b:1"])
    assert read_options(GatewayOptions, gateway, {}).allow_private_images


@pytest.mark.parametrize("command", ["up", "language"])
@pytest.mark.parametrize("flag", ["--max-model-len", "--max_model_len", "-tp"])
def test_a_flag_of_vllm_belongs_after_two_dashes(command: str, flag: str) -> None:
    with pytest.raises(
        ConfigError, match=f"^unknown flag {flag}: vLLM's flags go after --, as in dvd {command} MODEL -- {flag} "
    ):
        read_options(COMMANDS[command], ["m", f"{flag}=4096"], {})


@pytest.mark.parametrize("command", ["up", "language"])
def test_a_flag_that_nobody_has(command: str) -> None:
    with pytest.raises(
        ConfigError, match=f"^unknown flag --foo: dvd {command} --help lists the flags, and vLLM's flags go after --$"
    ):
        read_options(COMMANDS[command], ["m", "--foo"], {})
    with pytest.raises(ConfigError, match=r"^unknown flag --sink-byte: did you mean --sink-bytes\?$"):
        read_options(COMMANDS[command], ["m", "--sink-byte=1"], {})


def test_flags_of_vllm_can_be_in_the_file_and_reach_a_child(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("vllm: {max_model_len: 4096, override_generation_config: {a: [1, 'b c']}}")
    up = read_options(UpOptions, ["m", f"--config={tmp_path / 'f.yaml'}"], {})
    assert up.vllm == {"max_model_len": 4096, "override_generation_config": {"a": [1, "b c"]}}
    language = COMMANDS["language"]
    assert read_options(language, as_arguments(up, language), {}).model_dump()["vllm"] == up.vllm
    assert read_options(UpOptions, ["m"], {"DVD_VLLM": '{"max_model_len": 1}'}).vllm == {"max_model_len": 1}


@pytest.mark.parametrize("value", ["1", "[1]", "{", "{1: 2}", "x"])
def test_vllm_must_be_a_mapping(value: str) -> None:
    with pytest.raises(
        ConfigError, match='--vllm = .*: expected a mapping of flags of vllm serve, e.g. {"max_model_len": 4096}'
    ):
        read_options(UpOptions, ["m", f"--vllm={value}"], {})


@pytest.mark.parametrize("value", ["hunter2\n", " hunter2\r\n", "hunter2"])
def test_a_key_from_a_file_of_a_secret_is_trimmed(value: str) -> None:
    for arguments, variables in ((WORKERS, {"DVD_API_KEY": value}), ([*WORKERS, f"--api-key={value}"], {})):
        key = read_options(GatewayOptions, arguments, variables).api_key
        assert key is not None
        assert key.get_secret_value() == "hunter2"


@pytest.mark.parametrize(
    ("value", "reason"), [("", "the key is empty"), ("\n", "the key is empty"), ("a\nb", "printable"), ("é", "ASCII")]
)
def test_a_key_that_no_caller_can_send_is_an_error(value: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--api-key = \(secret\): .*{reason}"):
        read_options(GatewayOptions, WORKERS, {"DVD_API_KEY": value})


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        ([], {}, ("info", "text")),
        (["m", "--unknown", "--log-format=json", "--", "--log-level=x"], {}, ("info", "json")),
        (["--log-format", "json"], {"DVD_LOG_LEVEL": "debug", "DVD_LOG_FORMAT": "text", "DVD_UNKNOWN": "1"}, ("debug", "json")),
        (["--log-format=yaml"], {"DVD_LOG_LEVEL": "debug"}, ("info", "text")),
        (["--log-format"], {"DVD_LOG_FORMAT": "json"}, ("info", "json")),
        (["--config=/nowhere"], {"DVD_LOG_FORMAT": "json"}, ("info", "json")),
    ],
)
def test_how_to_log_is_known_even_if_options_are_invalid(
    arguments: list[str], variables: dict[str, str], expected: tuple[str, str]
) -> None:
    options = logging_options(arguments, variables)
    assert (options.log_level, options.log_format) == expected


def test_how_to_log_is_read_from_the_file_too(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("log_format: json\nunknown: 1")
    assert logging_options([f"--config={tmp_path / 'f.yaml'}"], {}).log_format == "json"


def test_a_listen_address_without_a_port_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"^--listen = 'here': expected HOST:PORT, \[IPV6\]:PORT or unix:/PATH$"):
        read_options(VisionOptions, ["m", "--listen=here"], {})


def test_known_names_are_those_of_all_commands() -> None:
    """A process must recognise the options of other commands without having their packages."""
    assert {name for options in COMMANDS.values() for name in options.model_fields} == KNOWN_NAMES


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_lists_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    options_class = COMMANDS[command]
    with pytest.raises(SystemExit):
        read_options(options_class, ["--help"], {})
    text = capsys.readouterr().out
    assert all(name in ("model", "address") or f"--{name.replace('_', '-')}" in text for name in options_class.model_fields)

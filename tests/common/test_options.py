"""Options: three sources, one schema, errors that name what is wrong."""

from pathlib import Path

import pytest

from common.options import ConfigError, as_arguments, read_options
from dvd.up_config import UpOptions
from server.config import GatewayOptions
from tests.option_classes import COMMANDS
from vision_worker.config import VisionOptions

MINE = ["--vision-workers=a:1,unix:/b", "--language-workers=c:3"]


def test_a_flag_wins_over_a_variable_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "dvd.yaml"
    file.write_text("port: 1\nhost: h\nmax_images: 3\nvision_dtype: float32\n")  # the last is another command's
    variables = {"DVD_CONFIG": str(file), "DVD_PORT": "2", "DVD_MAX_IMAGES": "4", "HOME": "/"}
    got = read_options(GatewayOptions, [*MINE, "--port", "5"], variables)
    assert (got.port, got.max_images, got.host) == (5, 4, "h")
    assert (got.vision_workers, got.language_workers) == (["a:1", "unix:/b"], ["c:3"])


@pytest.mark.parametrize(
    ("arguments", "variables", "says"),
    [
        (["--port=x"], {}, r"--port = 'x'"),
        (["--port=70000"], {}, "70000"),
        ([], {"DVD_PROT": "1"}, "unknown variable DVD_PROT: did you mean DVD_PORT"),
        (["--router-scope=tile"], {}, "--router-scope = 'tile'"),
        (["--max-tiles=41"], {}, "--max-tiles = '41'"),
        (["--allow-vir=maybe"], {}, "--allow-vir = 'maybe'"),
        (["--vir=on"], {}, "--vir = 'on'"),
        (["--vir-relative-threshold=1.5"], {}, "--vir-relative-threshold = '1.5'"),
        (["--vir-absolute-threshold=nan"], {}, "--vir-absolute-threshold = 'nan'"),
        ([], {"DVD_VIR_ABSOLUTE_THRESHOLD": "-0.1"}, "--vir-absolute-threshold = '-0.1'"),
        (["--vir=all", "--vir-relative-threshold=0"], {}, "--vir-relative-threshold = '0': only for --vir=auto, and it is all"),
        (["--vision-workers=nowhere"], {}, r"--vision-workers = 'nowhere': expected host:port, .*dns:name:port"),
        (["--vision-workers=a:1,dns:///vision:5"], {}, "--vision-workers = 'dns:///vision:5'"),
        (["--vision-workers=dns:a..b:5"], {}, "--vision-workers"),
        ([f"--language-workers=dns:{'a' * 64}:5"], {}, "--language-workers"),
        (["--language-workers=dns:vision"], {}, "--language-workers"),
        (["--language-workers=dns:vision:0"], {}, "--language-workers"),
        (["--language-workers=vision:65536"], {}, "--language-workers"),
        (["--config=/nowhere.yaml"], {}, "cannot read --config /nowhere.yaml"),
    ],
)
def test_a_bad_option_is_named(arguments: list[str], variables: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        read_options(GatewayOptions, [*MINE, *arguments], variables)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"), [("prot: 1", "unknown key 'prot'.*did you mean port"), ("- 1", "mapping"), ("{", "cannot")]
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_options(GatewayOptions, [*MINE, f"--config={tmp_path / 'f.yaml'}"], {})


@pytest.mark.parametrize(
    ("text", "vir", "thresholds"),
    [
        ("", "auto", (None, None)),
        ("vir: off", "off", (None, None)),  # false, to YAML
        ("vir: 'off'\nvir_relative_threshold: null", "off", (None, None)),
        ("vir: auto\nvir_relative_threshold: 0\nvir_absolute_threshold: 0.25", "auto", (0, 0.25)),
    ],
)
def test_the_router_in_a_file_and_on_its_way_to_the_gateway(
    tmp_path: Path, text: str, vir: str, thresholds: tuple[float | None, float | None]
) -> None:
    (tmp_path / "f.yaml").write_text(text)
    up = read_options(UpOptions, ["m", f"--config={tmp_path / 'f.yaml'}"], {})
    arguments = as_arguments(up, GatewayOptions, vision_workers=["a:1"], language_workers=["b:1"])
    gateway = read_options(GatewayOptions, arguments, {})
    for got in (up, gateway):
        assert (got.vir, (got.vir_relative_threshold, got.vir_absolute_threshold)) == (vir, thresholds)


def test_forms_of_a_workers_address() -> None:
    given = ["dns:vision:50051", "dns:vision.dvd.svc.cluster.local.:1", "vision:1", "[::1]:5", "unix:/a b", "dns:5"]
    got = read_options(GatewayOptions, ["--vision-workers=" + ",".join(given), "--language-workers=dns:language:2"], {})
    assert (got.vision_workers, got.language_workers) == (given, ["dns:language:2"])


def test_a_missing_model_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="missing MODEL"):
        read_options(VisionOptions, [], {})


def test_secrets_are_masked_and_never_become_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    secret = {"DVD_API_KEY": "hunter2"}
    with pytest.raises(SystemExit):
        read_options(GatewayOptions, [*MINE, "--print-config"], secret)
    assert "hunter2" not in capsys.readouterr().out
    got = read_options(GatewayOptions, MINE, secret)
    assert got.api_key is not None
    assert got.api_key.get_secret_value() == "hunter2"
    assert "hunter2" not in str(as_arguments(got, GatewayOptions)) + repr(got)


def test_a_bad_secret_is_not_printed() -> None:
    with pytest.raises(ConfigError) as caught:
        read_options(GatewayOptions, ["--port=x"], {"DVD_API_KEY": "hunter2"})
    assert "hunter2" not in str(caught.value)


def test_arguments_carry_a_configuration_to_a_child() -> None:
    up = read_options(UpOptions, ["m", "--max-batch-tiles=3", "--allow-private-images", "--sink-lease=2"], {})
    vision = read_options(VisionOptions, as_arguments(up, VisionOptions, listen="unix:/v"), {})
    assert (vision.model, vision.max_batch_tiles, vision.listen) == (Path("m"), 3, "unix:/v")
    gateway = as_arguments(up, GatewayOptions, vision_workers=["a:1"], language_workers=["b:1"])
    assert read_options(GatewayOptions, gateway, {}).allow_private_images


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_lists_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = COMMANDS[command]
    with pytest.raises(SystemExit):
        read_options(options, ["--help"], {})
    text = capsys.readouterr().out
    assert all(name in ("model", "address") or f"--{name.replace('_', '-')}" in text for name in options.model_fields)

"""docker-compose.yaml and its overlays, resolved by Compose itself and compared with images, options and documentation."""

import contextlib
import itertools
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.options import ConfigError, read_options
from common.security import check_listeners, read_credentials
from dvd.config import HealthOptions
from lm_worker.config import LanguageOptions, reject_own_flags, split_arguments
from lm_worker.vllm_flags import first_unknown
from server.config import GatewayOptions
from server.workers.discovery import parse_name
from tests.deploy.files import (
    BASE,
    BUILT_SERVICES,
    CONFIGURATIONS,
    CPU,
    DEPLOY,
    ONE_GPU,
    ROOT,
    VARIABLE,
    compose_config,
    dockerfile,
    dvd_environment,
    run_compose,
    seconds,
    services,
)
from tests.option_classes import COMMANDS
from vision_worker.config import VisionOptions

EVERY_CONFIGURATION = pytest.mark.parametrize("files", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
EXAMPLE = DEPLOY / ".env.example"
TOKEN = "a-token-of-this-cluster"
CLOSE_SECONDS = 10.0
"""Time a process has after its drain to close its connections and exit."""


def parse_options(service: str, config: Any) -> Any:
    """Parse a service's command with the real parser, in the image's environment."""
    command = dockerfile(service).entrypoint()
    assert command[:3] == ["tini", "--", "dvd"]
    assert command[3:] == [BUILT_SERVICES[service]]
    arguments, _ = split_arguments(config["command"])
    return read_options(COMMANDS[BUILT_SERVICES[service]], arguments, dvd_environment(service, config))


@EVERY_CONFIGURATION
def test_compose_accepts_the_files(files: tuple[Path, ...]) -> None:
    result = run_compose(files, "config", "--quiet")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_compose_rejects_an_unknown_key(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("services: {gateway: {shm_sizes: 1gb}}")
    result = run_compose((BASE, wrong), "config", "--quiet")
    assert result.returncode
    assert "shm_sizes" in result.stderr


@EVERY_CONFIGURATION
@pytest.mark.parametrize("service", BUILT_SERVICES)
def test_each_command_is_accepted_by_its_program(files: tuple[Path, ...], service: str) -> None:
    parse_options(service, services(files)[service])


@EVERY_CONFIGURATION
def test_flags_in_variables_reach_the_programs(files: tuple[Path, ...]) -> None:
    flags = {
        "GATEWAY_FLAGS": "--workers=3 --vir off", "VISION_FLAGS": "--prepare-threads 5", "PORT": "80", "BIND": "0.0.0.0",
        "VLLM_FLAGS": """--max-model-len 4096 --hf-overrides='{"a": 1}'""", "SINK_BYTES": "77", "MODEL": "some/8B",
        "DVD_API_KEY": "hunter2", "DVD_MAX_IMAGES": "3",
    }  # fmt: skip
    configs = services(files, **flags)
    gateway_options = parse_options("gateway", configs["gateway"])
    assert (gateway_options.workers, gateway_options.vir) == (3, "off")
    assert gateway_options.api_key.get_secret_value() == "hunter2"
    assert gateway_options.max_images != 3, "only the variables that Compose lists are passed on"
    assert parse_options("vision", configs["vision"]).prepare_threads == 5
    language_options = parse_options("language", configs["language"])
    assert (language_options.sink_bytes, str(language_options.model)) == (77, "/models/some/8B")
    _, vllm_flags = split_arguments(configs["language"]["command"])
    assert vllm_flags[-3:] == ["--max-model-len", "4096", '--hf-overrides={"a": 1}']


@EVERY_CONFIGURATION
def test_every_process_demands_the_token_and_does_not_start_without_it(files: tuple[Path, ...]) -> None:
    for variables, token in (({"DVD_CLUSTER_TOKEN": TOKEN}, TOKEN), ({}, None)):
        for service, flags in {"vision": ["listen"], "language": ["listen", "http"]}.items():
            options = parse_options(service, services(files, **variables)[service])
            credentials = read_credentials(options)
            assert credentials.token == token
            with pytest.raises(ConfigError, match="DVD_CLUSTER_TOKEN") if not token else contextlib.nullcontext():
                check_listeners(options, credentials, {name: getattr(options, name) for name in flags})
    assert read_credentials(parse_options("gateway", services(files, DVD_CLUSTER_TOKEN=TOKEN)["gateway"])).token == TOKEN


@EVERY_CONFIGURATION
def test_flags_after_the_dashes_are_vllms(files: tuple[Path, ...]) -> None:
    _, vllm_flags = split_arguments(services(files)["language"]["command"])
    reject_own_flags(vllm_flags)
    assert first_unknown(vllm_flags) is None


@pytest.mark.parametrize("overlay", [CPU, ONE_GPU])
def test_an_overlay_only_appends_to_a_command(overlay: Path) -> None:
    for service, config in services().items():
        command = config.get("command") or []
        assert (services((BASE, overlay))[service].get("command") or [])[: len(command)] == command


@EVERY_CONFIGURATION
def test_processes_find_each_other(files: tuple[Path, ...]) -> None:
    configs = services(files)
    gateway_options = parse_options("gateway", configs["gateway"])
    for address, worker in itertools.chain(
        zip(gateway_options.vision_workers, ["vision"], strict=True),
        zip(gateway_options.language_workers, ["language"], strict=True),
    ):
        assert parse_name(address) == (worker, int(parse_options(worker, configs[worker]).listen.rpartition(":")[2]))
        assert set(configs["gateway"]["networks"]) & set(configs[worker]["networks"]) == {"workers"}, (
            "two networks would give a worker two addresses"
        )
    assert set(configs["vision"]["networks"]) & set(configs["language"]["networks"]), (
        "embeddings go directly from vision to language"
    )
    cache = re.fullmatch(r"redis://(\w+):(\d+)/0", parse_options("vision", configs["vision"]).cache)
    assert cache is not None
    assert cache[2] == "6379"
    assert configs[cache[1]]["networks"] == configs["vision"]["networks"]
    for service in ("gateway", "vision", "language"):
        shared = set(configs["prometheus"]["networks"]) & set(configs[service]["networks"])
        assert shared == {"workers"}, "two networks would have it scraped twice"


@EVERY_CONFIGURATION
def test_processes_listen_on_the_ports_their_images_expose(files: tuple[Path, ...]) -> None:
    configs = services(files)
    gateway_options, vision_options, language_options = (parse_options(name, configs[name]) for name in BUILT_SERVICES)
    listening: dict[str, list[str]] = {
        "gateway": [f"{gateway_options.host}:{gateway_options.port}"],
        "vision": [vision_options.listen, f"0.0.0.0:{vision_options.metrics_port}"],
        "language": [language_options.listen, language_options.http, f"0.0.0.0:{language_options.metrics_port}"],
    }
    for service, addresses in listening.items():
        assert {host for host, _, _ in (a.rpartition(":") for a in addresses)} == {"0.0.0.0"}
        assert {int(a.rpartition(":")[2]) for a in addresses} == dockerfile(service).ports()


@EVERY_CONFIGURATION
def test_only_the_gateway_can_be_exposed_to_other_machines(files: tuple[Path, ...]) -> None:
    for bind in ("127.0.0.1", "0.0.0.0"):
        ports = {name: config["ports"] for name, config in services(files, BIND=bind).items() if "ports" in config}
        assert set(ports) == {"gateway", "prometheus", "grafana"}
        assert {name: port["host_ip"] for name, (port,) in ports.items()} == {
            "gateway": bind, "prometheus": "127.0.0.1", "grafana": "127.0.0.1",
        }  # fmt: skip
        assert {ports["gateway"][0]["target"]} == dockerfile("gateway").ports()
    assert [port["host_ip"] for port in services(files)["gateway"]["ports"]] == ["127.0.0.1"]
    assert compose_config(files)["networks"]["workers"]["internal"], "workers must not reach the internet"


@EVERY_CONFIGURATION
def test_containers_run_without_root_capabilities_or_a_writable_file_system(files: tuple[Path, ...]) -> None:
    for name, config in services(files).items():
        assert not config["user"].startswith(("0", "root")), name
        assert name not in BUILT_SERVICES or config["user"] == dockerfile(name).last("USER")
        assert config["read_only"], name
        assert (config["cap_drop"], config["security_opt"]) == (["ALL"], ["no-new-privileges:true"]), name
        assert not config.get("privileged")


@EVERY_CONFIGURATION
def test_every_service_scales_restarts_and_rotates_its_log(files: tuple[Path, ...]) -> None:
    for name, config in services(files).items():
        assert "container_name" not in config, name
        assert config["restart"] == "unless-stopped"
        assert set(config["logging"]["options"]) == {"max-size", "max-file"}
        assert config["healthcheck"]["test"][0] == "CMD"
        assert "latest" not in config["image"]
        assert ":" in config["image"]
    for name in ("vision", "language"):
        assert "ports" not in services(files)[name], "only one replica could publish a port"


@EVERY_CONFIGURATION
@pytest.mark.parametrize(
    ("service", "drain"),
    [
        ("gateway", GatewayOptions.model_fields["shutdown_grace"].default),
        ("vision", VisionOptions.model_fields["shutdown_grace"].default),
        ("language", LanguageOptions.model_fields["shutdown_grace"].default),
    ],
)
def test_the_stop_grace_period_covers_the_drain(files: tuple[Path, ...], service: str, drain: float) -> None:
    assert seconds(services(files)[service]["stop_grace_period"]) >= drain + CLOSE_SECONDS


@EVERY_CONFIGURATION
def test_embeddings_fit_into_shared_memory(files: tuple[Path, ...]) -> None:
    config = services(files)["language"]
    budget, shm_size = parse_options("language", config).sink_bytes, int(config["shm_size"])
    assert 0 < budget <= shm_size - (256 << 20), "vLLM's processes need part of it"


@EVERY_CONFIGURATION
def test_health_checks_equal_those_of_the_images(files: tuple[Path, ...]) -> None:
    for service in BUILT_SERVICES:
        check = services(files)[service]["healthcheck"]
        of_image, command = dockerfile(service).health()
        assert check["test"] == ["CMD", *command]
        for name in ("interval", "timeout", "start-period", "start-interval"):
            assert seconds(check[name.replace("-", "_")]) == seconds(of_image[name]), name
        assert check["retries"] == int(of_image["retries"])
        health_options = read_options(HealthOptions, command[2:], {})
        assert health_options.timeout < seconds(check["timeout"]), "it must be able to report what is wrong"
        assert int(re.findall(r":(\d+)", health_options.address)[-1]) in dockerfile(service).ports()
    assert seconds(services(files)["language"]["healthcheck"]["start_period"]) >= 600, "a large model takes minutes to load"
    assert seconds(services(files, LANGUAGE_START_PERIOD="2h")["language"]["healthcheck"]["start_period"]) == 7200


@EVERY_CONFIGURATION
def test_mounted_folders_exist(files: tuple[Path, ...]) -> None:
    for name, config in services(files).items():
        for mount in config.get("volumes", []):
            if mount["type"] == "bind":
                assert Path(mount["source"]).is_dir(), (name, mount["source"])
                assert mount["read_only"], name
            else:
                assert mount["source"] in compose_config(files)["volumes"]
    for service in ("vision", "language"):
        config = services(files)[service]
        (models,) = [mount for mount in config["volumes"] if mount["type"] == "bind"]
        folder = parse_options(service, config).model.relative_to(models["target"])
        assert (Path(models["source"]) / folder / "config.json").is_file(), "the bundled checkpoint is the default"
        other_model = services(files, MODELS="/srv/models", MODEL="8B")[service]
        assert other_model["volumes"][0]["source"] == "/srv/models"
        assert str(parse_options(service, other_model).model) == "/models/8B"


def gpu_ids(config: Any) -> list[str]:
    reservations = config.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
    assert all(reservation["capabilities"] == ["gpu"] for reservation in reservations)
    return [device for reservation in reservations for device in reservation["device_ids"]]


@pytest.mark.parametrize(
    ("files", "variables", "vision", "language"),
    [
        ((BASE,), {}, ["0"], ["1"]), ((BASE,), {"VISION_GPU": "3", "LANGUAGE_GPU": "2"}, ["3"], ["2"]),
        ((BASE, CPU), {}, [], []), ((BASE, ONE_GPU), {}, ["0"], ["0"]), ((BASE, ONE_GPU), {"GPU": "5"}, ["5"], ["5"]),
    ],
)  # fmt: skip
def test_each_configuration_reserves_its_gpus(
    files: tuple[Path, ...], variables: dict[str, str], vision: list[str], language: list[str]
) -> None:
    configs = services(files, **variables)
    assert (gpu_ids(configs["vision"]), gpu_ids(configs["language"])) == (vision, language)
    assert not any(gpu_ids(configs[name]) for name in configs if name not in ("vision", "language"))


def test_on_one_gpu_the_memory_is_split() -> None:
    config = services((BASE, ONE_GPU))["language"]
    assert "--gpu-memory-utilization=0.8" in config["command"]
    condition = config["depends_on"]["vision"]["condition"]
    assert condition == "service_healthy", "vLLM must measure free memory after the vision worker has allocated its own"


@EVERY_CONFIGURATION
def test_images_are_built_from_this_repository(files: tuple[Path, ...]) -> None:
    for service in BUILT_SERVICES:
        build = services(files)[service]["build"]
        assert Path(build["context"]) == ROOT
        assert ROOT / build["dockerfile"] == dockerfile(service).path
        accepted = {argument.split("=")[0] for argument in dockerfile(service).all("ARG")}
        assert set(build.get("args", {})) == accepted
        assert set(build.get("args", {}).values()) <= {"cpu" if CPU in files else "cuda"}
    assert ("-cpu" in services(files)["vision"]["image"]) == (CPU in files), "the two builds must not share a tag"


def deploy_texts() -> dict[str, str]:
    paths = [path for path in DEPLOY.rglob("*") if path.suffix in (".yaml", ".Dockerfile", ".md", ".example")]
    assert len(paths) > 8
    return {path.name: path.read_text() for path in paths}


def test_every_dvd_variable_is_an_option() -> None:
    known = {f"DVD_{name.upper()}" for options in COMMANDS.values() for name in options.model_fields}
    used = {name for text in deploy_texts().values() for name in re.findall(r"DVD_[A-Z_]+", text)}
    assert used
    assert used <= known


def test_every_variable_is_in_the_example_with_its_default() -> None:
    defaults: dict[str, set[str]] = {}
    for file in (BASE, CPU, ONE_GPU):
        for name, default in VARIABLE.findall(file.read_text()):
            defaults.setdefault(name, set()).add(default)
    documented = dict(re.findall(r"^# ?([A-Z_]+)=(\S*)", EXAMPLE.read_text(), re.MULTILINE))
    assert set(documented) == {*defaults, "DVD_API_KEY", "DVD_CLUSTER_TOKEN"}
    assert {name: value for name, value in documented.items() if value not in defaults.get(name, {""})} == {}
    result = run_compose((BASE,), "config", "--quiet", **documented)
    assert (result.returncode, result.stderr) == (0, "")


def test_no_file_contains_a_secret() -> None:
    assert services()["gateway"]["environment"] == {"DVD_API_KEY": None, "DVD_CLUSTER_TOKEN": None}
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
    assert not re.search(r"(?i)(password|secret|token)[ \t]*[:=][ \t]*[^\s$]", "".join(deploy_texts().values()))


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DEPLOY / "README.md").read_text(), re.DOTALL)


def test_documented_commands_name_files_that_compose_accepts() -> None:
    pattern = re.compile(r"docker compose((?: -f \S+)+)")
    commands = {
        command for text in (*deploy_texts().values(), (ROOT / "README.md").read_text()) for command in pattern.findall(text)
    }
    assert len(commands) >= 3
    for command in commands:
        files = tuple(ROOT / word for word in command.split() if word != "-f")
        assert run_compose(files, "config", "--quiet").returncode == 0, command


def test_the_readmes_second_vision_service_works(tmp_path: Path) -> None:
    (text,) = readme_blocks("yaml")
    folder = Path(shutil.copytree(DEPLOY, tmp_path / "deploy"))
    (folder / "more.yaml").write_text(text)
    configs = services((folder / BASE.name, folder / "more.yaml"))
    (added,) = set(configs) - set(services())
    assert gpu_ids(configs[added]) == ["2"]
    assert gpu_ids(configs["vision"]) == ["0"]
    assert configs[added]["networks"]["workers"]["aliases"] == ["vision"], "the gateway resolves one name"
    assert configs[added]["command"] == configs["vision"]["command"]

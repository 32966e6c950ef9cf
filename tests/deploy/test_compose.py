"""What docker-compose.yaml and its overlays promise, read by Compose itself and held against the programs."""

import itertools
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.options import read_options
from dvd.config import HealthOptions
from lm_worker import sink
from lm_worker.config import reject_own_flags, split_arguments
from server import __main__ as gateway
from server.workers.discovery import parse_name
from tests.deploy.files import (
    BASE,
    CPU,
    DEPLOY,
    ONE_GPU,
    OURS,
    ROOT,
    SETS,
    VARIABLE,
    dockerfile,
    environment,
    run_compose,
    seconds,
    services,
    whole,
)  # fmt: skip
from tests.option_classes import COMMANDS
from vision_worker import __main__ as vision

EVERY_SET = pytest.mark.parametrize("files", SETS.values(), ids=SETS)
EXAMPLE = DEPLOY / ".env.example"
ENDING = 10.0
"""Seconds beyond a drain in which a process must have closed what it has."""


def options(service: str, said: Any) -> Any:
    """The command of a service by the real parser, in the image's environment."""
    command = dockerfile(service).entrypoint()
    assert command[:3] == ["tini", "--", "dvd"]
    assert command[3:] == [OURS[service]]
    arguments, _ = split_arguments(said["command"])
    return read_options(COMMANDS[OURS[service]], arguments, environment(service, said))


@EVERY_SET
def test_compose_takes_the_files(files: tuple[Path, ...]) -> None:
    done = run_compose(files, "config", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_compose_refuses_what_is_wrong(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("services: {gateway: {shm_sizes: 1gb}}")
    done = run_compose((BASE, wrong), "config", "--quiet")
    assert done.returncode
    assert "shm_sizes" in done.stderr


@EVERY_SET
@pytest.mark.parametrize("service", OURS)
def test_each_command_is_one_that_its_program_takes(files: tuple[Path, ...], service: str) -> None:
    options(service, services(files)[service])


@EVERY_SET
def test_flags_of_variables_reach_the_programs(files: tuple[Path, ...]) -> None:
    flags = {
        "GATEWAY_FLAGS": "--workers=3 --vir off", "VISION_FLAGS": "--prepare-threads 5", "PORT": "80", "BIND": "0.0.0.0",
        "VLLM_FLAGS": """--max-model-len 4096 --hf-overrides='{"a": 1}'""", "SINK_BYTES": "77", "MODEL": "some/8B",
        "DVD_API_KEY": "hunter2", "DVD_MAX_IMAGES": "3",
    }  # fmt: skip
    said = services(files, **flags)
    door = options("gateway", said["gateway"])
    assert (door.workers, door.vir, door.api_key.get_secret_value()) == (3, "off", "hunter2")
    assert door.max_images != 3, "only what is listed goes in"
    assert options("vision", said["vision"]).prepare_threads == 5
    language = options("language", said["language"])
    assert (language.sink_bytes, str(language.model)) == (77, "/models/some/8B")
    _, theirs = split_arguments(said["language"]["command"])
    assert theirs[-3:] == ["--max-model-len", "4096", '--hf-overrides={"a": 1}']


@EVERY_SET
def test_what_follows_the_dashes_is_left_to_vllm(files: tuple[Path, ...]) -> None:
    _, theirs = split_arguments(services(files)["language"]["command"])
    reject_own_flags(theirs)


@pytest.mark.parametrize("overlay", [CPU, ONE_GPU])
def test_an_overlay_only_adds_to_a_command(overlay: Path) -> None:
    for service, said in services().items():
        command = said.get("command") or []
        assert (services((BASE, overlay))[service].get("command") or [])[: len(command)] == command


@EVERY_SET
def test_processes_find_each_other(files: tuple[Path, ...]) -> None:
    said = services(files)
    door = options("gateway", said["gateway"])
    for address, of in itertools.chain(
        zip(door.vision_workers, ["vision"], strict=True), zip(door.language_workers, ["language"], strict=True)
    ):
        assert parse_name(address) == (of, int(options(of, said[of]).listen.rpartition(":")[2]))
        assert set(said["gateway"]["networks"]) & set(said[of]["networks"]) == {"workers"}, "one road: one address a worker"
    assert set(said["vision"]["networks"]) & set(said["language"]["networks"]), "embeddings go straight"
    host, port = re.fullmatch(r"redis://(\w+):(\d+)/0", options("vision", said["vision"]).cache).groups()  # type: ignore[union-attr]
    assert (host in said, port, said[host]["networks"]) == (True, "6379", said["vision"]["networks"])
    for service in ("gateway", "vision", "language"):
        roads = set(said["prometheus"]["networks"]) & set(said[service]["networks"])
        assert roads == {"workers"}, "one road: scraped once"


@EVERY_SET
def test_processes_listen_on_the_ports_that_their_images_expose(files: tuple[Path, ...]) -> None:
    said = services(files)
    listening: dict[str, list[str]] = {
        "gateway": [f"{(door := options('gateway', said['gateway'])).host}:{door.port}"],
        "vision": [(eye := options("vision", said["vision"])).listen, f"0.0.0.0:{eye.metrics_port}"],
        "language": [(tongue := options("language", said["language"])).listen, tongue.http, f"0.0.0.0:{tongue.metrics_port}"],
    }
    for service, addresses in listening.items():
        assert {host for host, _, _ in (a.rpartition(":") for a in addresses)} == {"0.0.0.0"}
        assert {int(a.rpartition(":")[2]) for a in addresses} == dockerfile(service).ports()


@EVERY_SET
def test_only_the_door_can_be_opened_to_others(files: tuple[Path, ...]) -> None:
    for bind in ("127.0.0.1", "0.0.0.0"):
        ports = {name: said["ports"] for name, said in services(files, BIND=bind).items() if "ports" in said}
        assert set(ports) == {"gateway", "prometheus", "grafana"}
        assert {name: port["host_ip"] for name, (port,) in ports.items()} == {
            "gateway": bind, "prometheus": "127.0.0.1", "grafana": "127.0.0.1",
        }  # fmt: skip
        assert {ports["gateway"][0]["target"]} == dockerfile("gateway").ports()
    assert [port["host_ip"] for port in services(files)["gateway"]["ports"]] == ["127.0.0.1"]
    assert whole(files)["networks"]["workers"]["internal"], "a worker has no way out"


@EVERY_SET
def test_nobody_is_root_or_may_write_where_it_should_not(files: tuple[Path, ...]) -> None:
    for name, said in services(files).items():
        assert not said["user"].startswith(("0", "root")), name
        assert name not in OURS or said["user"] == dockerfile(name).last("USER")
        assert (said["read_only"], said["cap_drop"], said["security_opt"]) == (True, ["ALL"], ["no-new-privileges:true"]), name
        assert not said.get("privileged")


@EVERY_SET
def test_every_service_can_be_scaled_restarted_and_its_log_ends(files: tuple[Path, ...]) -> None:
    for name, said in services(files).items():
        assert "container_name" not in said, name
        assert said["restart"] == "unless-stopped"
        assert set(said["logging"]["options"]) == {"max-size", "max-file"}
        assert said["healthcheck"]["test"][0] == "CMD"
        assert "latest" not in said["image"]
        assert ":" in said["image"]
    for name in ("vision", "language"):
        assert "ports" not in services(files)[name], "a published port is taken by the first replica"


@EVERY_SET
@pytest.mark.parametrize(
    ("service", "drain"), [("gateway", gateway._GRACE), ("vision", vision._GRACE), ("language", sink._STOP_GRACE_SECONDS)]
)
def test_a_stop_leaves_time_for_the_drain(files: tuple[Path, ...], service: str, drain: float) -> None:
    assert seconds(services(files)[service]["stop_grace_period"]) >= drain + ENDING


@EVERY_SET
def test_embeddings_fit_the_shared_memory(files: tuple[Path, ...]) -> None:
    said = services(files)["language"]
    budget, room = options("language", said).sink_bytes, int(said["shm_size"])
    assert 0 < budget <= room - (256 << 20), "vLLM's processes need some of it"


@EVERY_SET
def test_health_is_asked_as_the_images_say(files: tuple[Path, ...]) -> None:
    for service in OURS:
        said = services(files)[service]["healthcheck"]
        of_image, command = dockerfile(service).health()
        assert said["test"] == ["CMD", *command]
        for name in ("interval", "timeout", "start-period", "start-interval"):
            assert seconds(said[name.replace("-", "_")]) == seconds(of_image[name]), name
        assert said["retries"] == int(of_image["retries"])
        asked = read_options(HealthOptions, command[2:], {})
        assert asked.timeout < seconds(said["timeout"]), "it must be able to say what is wrong"
        assert int(re.findall(r":(\d+)", asked.address)[-1]) in dockerfile(service).ports()
    assert seconds(services(files)["language"]["healthcheck"]["start_period"]) >= 600, "a large model loads for minutes"
    assert seconds(services(files, LANGUAGE_START_PERIOD="2h")["language"]["healthcheck"]["start_period"]) == 7200


@EVERY_SET
def test_what_is_mounted_is_there(files: tuple[Path, ...]) -> None:
    for name, said in services(files).items():
        for mount in said.get("volumes", []):
            if mount["type"] == "bind":
                assert Path(mount["source"]).is_dir(), (name, mount["source"])
                assert mount["read_only"], name
            else:
                assert mount["source"] in whole(files)["volumes"]
    for service in ("vision", "language"):
        said = services(files)[service]
        (models,) = [mount for mount in said["volumes"] if mount["type"] == "bind"]
        inside = options(service, said).model.relative_to(models["target"])
        assert (Path(models["source"]) / inside / "config.json").is_file(), "the bundled checkpoint, unless told otherwise"
        moved = services(files, MODELS="/srv/models", MODEL="8B")[service]
        assert moved["volumes"][0]["source"] == "/srv/models"
        assert str(options(service, moved).model) == "/models/8B"


def devices(said: Any) -> list[str]:
    reserved = said.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
    assert all(one["capabilities"] == ["gpu"] for one in reserved)
    return [device for one in reserved for device in one["device_ids"]]


@pytest.mark.parametrize(
    ("files", "variables", "vision", "language"),
    [
        ((BASE,), {}, ["0"], ["1"]), ((BASE,), {"VISION_GPU": "3", "LANGUAGE_GPU": "2"}, ["3"], ["2"]),
        ((BASE, CPU), {}, [], []), ((BASE, ONE_GPU), {}, ["0"], ["0"]), ((BASE, ONE_GPU), {"GPU": "5"}, ["5"], ["5"]),
    ],
)  # fmt: skip
def test_devices(files: tuple[Path, ...], variables: dict[str, str], vision: list[str], language: list[str]) -> None:
    said = services(files, **variables)
    assert (devices(said["vision"]), devices(said["language"])) == (vision, language)
    assert not any(devices(said[name]) for name in said if name not in ("vision", "language"))


def test_on_one_gpu_the_memory_is_split() -> None:
    said = services((BASE, ONE_GPU))["language"]
    assert "--gpu-memory-utilization=0.8" in said["command"]
    assert said["depends_on"]["vision"]["condition"] == "service_healthy", "what vision holds is held before vLLM measures"


@EVERY_SET
def test_images_are_built_from_here(files: tuple[Path, ...]) -> None:
    for service in OURS:
        build = services(files)[service]["build"]
        assert Path(build["context"]) == ROOT
        assert ROOT / build["dockerfile"] == dockerfile(service).path
        accepted = {argument.split("=")[0] for argument in dockerfile(service).all("ARG")}
        assert set(build.get("args", {})) == accepted
        assert set(build.get("args", {}).values()) <= {"cpu" if CPU in files else "cuda"}
    assert ("-cpu" in services(files)["vision"]["image"]) == (CPU in files), "one build must not be taken for the other"


def texts() -> dict[str, str]:
    found = [path for path in DEPLOY.rglob("*") if path.suffix in (".yaml", ".Dockerfile", ".md", ".example")]
    assert len(found) > 8
    return {path.name: path.read_text() for path in found}


def test_every_variable_of_ours_is_an_option() -> None:
    known = {f"DVD_{name.upper()}" for options in COMMANDS.values() for name in options.model_fields}
    used = {name for text in texts().values() for name in re.findall(r"DVD_[A-Z_]+", text)}
    assert used
    assert used <= known


def test_every_variable_is_in_the_example_with_its_default() -> None:
    defaults: dict[str, set[str]] = {}
    for file in (BASE, CPU, ONE_GPU):
        for name, default in VARIABLE.findall(file.read_text()):
            defaults.setdefault(name, set()).add(default)
    shown = dict(re.findall(r"^# ?([A-Z_]+)=(\S*)", EXAMPLE.read_text(), re.MULTILINE))
    assert set(shown) == {*defaults, "DVD_API_KEY"}
    assert {name: value for name, value in shown.items() if value not in defaults.get(name, {""})} == {}
    done = run_compose((BASE,), "config", "--quiet", **shown)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_secret_is_in_a_file() -> None:
    assert services()["gateway"]["environment"] == {"DVD_API_KEY": None}
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
    assert not re.search(r"(?i)(password|secret|token)\s*[:=]\s*\S", "".join(texts().values()))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DEPLOY / "README.md").read_text(), re.DOTALL)


def test_commands_of_the_readme_name_files_that_compose_takes() -> None:
    pattern = re.compile(r"docker compose((?: -f \S+)+)")
    found = {command for text in (*texts().values(), (ROOT / "README.md").read_text()) for command in pattern.findall(text)}
    assert len(found) >= 3
    for command in found:
        files = tuple(ROOT / word for word in command.split() if word != "-f")
        assert run_compose(files, "config", "--quiet").returncode == 0, command


def test_the_second_vision_service_of_the_readme(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    beside = Path(shutil.copytree(DEPLOY, tmp_path / "deploy"))
    (beside / "more.yaml").write_text(text)
    said = services((beside / BASE.name, beside / "more.yaml"))
    (added,) = set(said) - set(services())
    assert devices(said[added]) == ["2"]
    assert devices(said["vision"]) == ["0"]
    assert said[added]["networks"]["workers"]["aliases"] == ["vision"], "found by the same name"
    assert said[added]["command"] == said["vision"]["command"]

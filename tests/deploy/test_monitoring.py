"""Prometheus and Grafana look where something answers."""

import urllib.parse
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.files import DEPLOY, OURS, dockerfile, environment, services

PROMETHEUS: Any = yaml.safe_load((DEPLOY / "prometheus/prometheus.yaml").read_text())
METRICS = {
    "gateway": ("gateway", "DVD_PORT"),
    "vision": ("vision", "DVD_METRICS_PORT"),
    "sink": ("language", "DVD_METRICS_PORT"),
    "language": ("language", "DVD_HTTP"),
}
"""By Prometheus' job, the service, and which option of it says where its metrics are."""


def inside(service: str, path: str) -> Path:
    """The file of this repository that a container has at a path."""
    for mount in services()[service]["volumes"]:
        if mount["type"] == "bind" and Path(path).is_relative_to(mount["target"]):
            return Path(mount["source"]) / Path(path).relative_to(mount["target"])
    raise AssertionError(f"{service} has no {path}")


def test_every_replica_of_every_process_is_scraped() -> None:
    jobs = {job["job_name"]: job for job in PROMETHEUS["scrape_configs"]}
    assert set(OURS) == {service for service, _ in METRICS.values()}
    for job, (service, option) in METRICS.items():
        (found,) = jobs[job]["dns_sd_configs"]
        said = services()[service]
        assert (found["names"], found["type"]) == ([service], "A")
        assert str(found["port"]) == environment(service, said)[option].rpartition(":")[2]
        assert found["port"] in dockerfile(service).ports()


def test_prometheus_reads_the_files_that_are_mounted() -> None:
    (flag,) = [word for word in services()["prometheus"]["command"] if word.startswith("--config.file=")]
    assert inside("prometheus", flag.partition("=")[2]) == DEPLOY / "prometheus/prometheus.yaml"
    assert PROMETHEUS["rule_files"] == ["rules.yaml"], "beside it"


def test_grafana_knows_prometheus_and_its_boards() -> None:
    said = services()["grafana"]
    provisioning = inside("grafana", said["environment"]["GF_PATHS_PROVISIONING"])
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    url = urllib.parse.urlsplit(source["url"])
    assert url.hostname in services()
    assert str(url.port) == services()["prometheus"]["healthcheck"]["test"][-1].split(":")[2].split("/")[0]
    assert set(said["networks"]) & set(services()[str(url.hostname)]["networks"])
    (boards,) = yaml.safe_load((provisioning / "dashboards/dvd.yaml").read_text())["providers"]
    assert inside("grafana", boards["options"]["path"]) == DEPLOY / "grafana/dashboards"

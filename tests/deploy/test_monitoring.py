"""Prometheus and Grafana are configured with the addresses and paths that Compose gives them."""

import urllib.parse
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.files import BUILT_SERVICES, DEPLOY, dockerfile, dvd_environment, services

PROMETHEUS: Any = yaml.safe_load((DEPLOY / "prometheus/prometheus.yaml").read_text())
METRICS = {
    "gateway": ("gateway", "DVD_PORT"),
    "vision": ("vision", "DVD_METRICS_PORT"),
    "sink": ("language", "DVD_METRICS_PORT"),
    "language": ("language", "DVD_HTTP"),
}
"""For each Prometheus job, the service and the variable with the port of its metrics."""


def host_path(service: str, path: str) -> Path:
    """Return the file of this repository that a container has mounted at a path."""
    for mount in services()[service]["volumes"]:
        if mount["type"] == "bind" and Path(path).is_relative_to(mount["target"]):
            return Path(mount["source"]) / Path(path).relative_to(mount["target"])
    raise AssertionError(f"{service} has nothing mounted at {path}")


def test_every_replica_of_every_process_is_scraped() -> None:
    jobs = {job["job_name"]: job for job in PROMETHEUS["scrape_configs"]}
    assert set(BUILT_SERVICES) == {service for service, _ in METRICS.values()}
    for job, (service, variable) in METRICS.items():
        (discovery,) = jobs[job]["dns_sd_configs"]
        environment = dvd_environment(service, services()[service])
        assert (discovery["names"], discovery["type"]) == ([service], "A")
        assert str(discovery["port"]) == environment[variable].rpartition(":")[2]
        assert discovery["port"] in dockerfile(service).ports()


def test_prometheus_reads_the_mounted_files() -> None:
    (flag,) = [word for word in services()["prometheus"]["command"] if word.startswith("--config.file=")]
    assert host_path("prometheus", flag.partition("=")[2]) == DEPLOY / "prometheus/prometheus.yaml"
    assert PROMETHEUS["rule_files"] == ["rules.yaml"], "relative to prometheus.yaml"


def test_grafana_is_provisioned_with_prometheus_and_the_dashboards() -> None:
    grafana = services()["grafana"]
    provisioning = host_path("grafana", grafana["environment"]["GF_PATHS_PROVISIONING"])
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    url = urllib.parse.urlsplit(source["url"])
    assert url.hostname in services()
    assert str(url.port) == services()["prometheus"]["healthcheck"]["test"][-1].split(":")[2].split("/")[0]
    assert set(grafana["networks"]) & set(services()[str(url.hostname)]["networks"])
    (dashboards,) = yaml.safe_load((provisioning / "dashboards/dvd.yaml").read_text())["providers"]
    assert host_path("grafana", dashboards["options"]["path"]) == DEPLOY / "grafana/dashboards"

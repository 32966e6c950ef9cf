"""Variables that Kubernetes sets for services, and mistakes that look similar."""

import pytest

from common.options import ConfigError, read_options
from common.service_links import is_service_link
from server.config import GatewayOptions

WORKERS = ["--vision-workers=a:1", "--language-workers=b:1"]


def links(service: str, ip: str = "10.96.0.7", protocol: str = "tcp") -> dict[str, str]:
    """Returns the variables of a service with a named port, as the kubelet writes them."""
    name = service.upper().replace("-", "_")
    host = f"[{ip}]" if ":" in ip else ip
    url, port = f"{protocol}://{host}:80", f"{name}_PORT_80_{protocol.upper()}"
    return {
        f"{name}_SERVICE_HOST": ip, f"{name}_SERVICE_PORT": "80", f"{name}_SERVICE_PORT_HTTP": "80", f"{name}_PORT": url,
        port: url, f"{port}_PROTO": protocol, f"{port}_PORT": "80", f"{port}_ADDR": ip,
    }  # fmt: skip


@pytest.mark.parametrize("service", ["dvd", "dvd-gateway", "dvd-vision", "dvd-language", "dvd-metrics", "dvd-vllm-2"])
@pytest.mark.parametrize(("ip", "protocol"), [("10.96.0.7", "tcp"), ("fd00::7", "udp")])
def test_variables_of_a_service_are_ignored(service: str, ip: str, protocol: str) -> None:
    options = read_options(GatewayOptions, WORKERS, links(service, ip, protocol))
    assert options == read_options(GatewayOptions, WORKERS, {})


def test_they_are_listed_in_one_line_at_debug_level(capsys: pytest.CaptureFixture[str]) -> None:
    read_options(GatewayOptions, WORKERS, {**links("dvd"), "DVD_LOG_LEVEL": "debug"})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dvd gateway: ignored variables that describe services of Kubernetes: DVD_PORT, DVD_PORT_80_TCP, ")
    read_options(GatewayOptions, WORKERS, links("dvd"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DVD_VISION_WORKER", "a:1"),
        ("DVD_GATEWAY_PORT", "8000"),
        ("DVD_SERVICE_HOST", "vision"),
        ("DVD_SERVICE_PORT", "http"),
        ("DVD_PORT_80_TCP", "80"),
        ("DVD_VISION_HOST", "10.0.0.1"),
    ],
)
def test_a_mistake_is_still_an_error(variable: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown variable {variable}"):
        read_options(GatewayOptions, WORKERS, {variable: value})


def test_an_option_with_the_name_of_a_link_keeps_its_value() -> None:
    assert read_options(GatewayOptions, WORKERS, {"DVD_PORT": "8080"}).port == 8080
    assert not is_service_link("DVD_METRICS_PORT", "9400")

"""Variables that Kubernetes sets in every container for each service of its namespace.

A service called `dvd-gateway` yields `DVD_GATEWAY_PORT=tcp://10.0.0.1:80` and more, which look like options of `dvd`. See
https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables.
"""

import ipaddress
import re
from collections.abc import Callable

_PROTOCOL = r"(TCP|UDP|SCTP)"


def is_service_link(variable: str, value: str) -> bool:
    """Return whether name and value of a variable both have the form of one that describes a service."""
    return any(re.search(f"_{name}$", variable) and is_valid(value) for name, is_valid in _FORMS)


def _is_url(text: str) -> bool:
    return bool(re.fullmatch(r"(tcp|udp|sctp)://\S+:\d+", text))


def _is_port(text: str) -> bool:
    return bool(re.fullmatch(r"\d{1,5}", text))


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_protocol(text: str) -> bool:
    return text in ("tcp", "udp", "sctp")


_FORMS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("SERVICE_HOST", _is_ip),
    (r"SERVICE_PORT(_\w+)?", _is_port),
    ("PORT", _is_url),
    (rf"PORT_\d+_{_PROTOCOL}", _is_url),
    (rf"PORT_\d+_{_PROTOCOL}_PROTO", _is_protocol),
    (rf"PORT_\d+_{_PROTOCOL}_PORT", _is_port),
    (rf"PORT_\d+_{_PROTOCOL}_ADDR", _is_ip),
)
"""Ends of names, and what their values are."""

"""The address of a language worker's vLLM, derived from what the worker's sink reports.

The sink reports the value of `--http`, the address that vLLM listens on. Another machine cannot always connect to that
address.
"""

import ipaddress

_LOOPBACK = "127.0.0.1"


def vllm_address(http: str, sink_address: str) -> str:
    """Return the address to connect to for vLLM's HTTP server.

    Args:
        http: address that vLLM listens on, as the sink describes it: `unix:/PATH`, `HOST:PORT` or `:PORT`.
        sink_address: address at which the caller reaches the sink, `unix:/PATH` or `HOST:PORT`.

    Returns:
        `http` itself, or, where vLLM listens on every address of its machine (0.0.0.0, :: or no host), the sink's host with
        vLLM's port.
    """
    if http.startswith("unix:"):
        return http
    host, _, port = http.rpartition(":")
    ip = _parse_ip(host)
    return f"{_host_of(sink_address)}:{port}" if ip and ip.is_unspecified else http


def is_unreachable_loopback(http: str, sink_address: str) -> bool:
    """Return whether vLLM listens on loopback only, while the sink has another machine's address.

    A host name counts as another machine, although it may resolve to this one. Callers should warn, but still connect.
    """
    if http.startswith("unix:"):
        return False
    ip, sink_ip = _parse_ip(http.rpartition(":")[0]), _parse_ip(_host_of(sink_address))
    return bool(ip and ip.is_loopback and not (sink_ip and sink_ip.is_loopback))


def _host_of(address: str) -> str:
    return _LOOPBACK if address.startswith("unix:") else address.rpartition(":")[0]


def _parse_ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the IP address that `host` is, or None for a host name. IPv6 is in brackets; an empty host is every address."""
    try:
        return ipaddress.ip_address({"": "0.0.0.0", "localhost": _LOOPBACK}.get(host, host.strip("[]")))
    except ValueError:
        return None

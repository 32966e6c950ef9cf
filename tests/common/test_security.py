"""Options of the cluster token and of TLS, and when a process refuses to listen without them."""

import logging
from pathlib import Path
from typing import Any

import pytest

from common.options import ConfigError, as_arguments, effective_values, read_options
from common.security import OPEN, Credentials, ProcessOptions, check_listeners, is_private, read_credentials
from lm_worker.config import LanguageOptions
from server.config import GatewayOptions
from tests.certificates import Authority
from vision_worker.config import VisionOptions

TOKEN = "correct-horse-battery-staple"


class Options(ProcessOptions):
    """Options of a process that listens."""

    command = "test"


def test_a_token_comes_from_a_variable_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    environments = ({"DVD_CLUSTER_TOKEN": f"{TOKEN}\n"}, {"DVD_CLUSTER_TOKEN_FILE": str(file)})
    assert {read_credentials(read_options(Options, [], environment)).token for environment in environments} == {TOKEN}
    assert read_credentials(read_options(Options, [], {})) == OPEN


@pytest.mark.parametrize(
    "token", ["", "short", "x" * 513, "with space in the middle", "schlüssel-schlüssel", "a" * 20 + "\n" + "b"]
)
def test_a_bad_token_is_named_by_its_option_and_not_shown(tmp_path: Path, token: str) -> None:
    file = tmp_path / "token"
    file.write_text(token)
    for environment in ({"DVD_CLUSTER_TOKEN": token}, {"DVD_CLUSTER_TOKEN_FILE": str(file)}):
        with pytest.raises(ConfigError, match=r"expected 16 to 512 printable ASCII") as caught:
            read_credentials(read_options(Options, [], environment))
        assert not token or token not in str(caught.value)


def test_contradictory_or_missing_files_are_named(tmp_path: Path) -> None:
    tls = Authority(tmp_path).issue("peer")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"cluster_token": TOKEN, "cluster_token_file": tmp_path}, "both set"),
        ({"cluster_token_file": tmp_path / "absent"}, "No such file"),
        ({"tls_cert": tls.cert}, "--tls-key and --tls-ca missing"),
        ({"tls_cert": tls.cert, "tls_key": tls.ca, "tls_ca": tls.ca}, "--tls-cert"),
        ({"tls_cert": tls.cert, "tls_key": tls.key, "tls_ca": tmp_path / "absent"}, "No such file"),
    ]
    for options, message in cases:
        with pytest.raises(ConfigError, match=message):
            read_credentials(Options(**options))
    good = read_credentials(Options(tls_cert=tls.cert, tls_key=tls.key, tls_ca=tls.ca))
    assert good.tls == tls


@pytest.mark.parametrize("address", ["unix:/tmp/x", "127.0.0.1:1", "127.8.9.1:1", "[::1]:1", "localhost:1"])
def test_addresses_of_this_machine_alone_need_no_token(address: str) -> None:
    assert is_private(address)
    check_listeners(Options(), OPEN, {"--listen": address, "--admin": None})


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "[fe80::1]:1", "example.org:1", "127.0.0.1.nip.io:1"])
def test_an_address_that_others_reach_needs_a_token_or_tls(
    address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match="--listen = .*: other machines can reach it.*DVD_CLUSTER_TOKEN.*--insecure"):
        check_listeners(Options(), OPEN, {"--listen": address, "--http": "127.0.0.1:1"})
    for credentials in (Credentials(TOKEN), Authority(tmp_path).credentials("peer")):
        check_listeners(Options(), credentials, {"--listen": address})
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        check_listeners(Options(insecure=True), OPEN, {"--listen": address})
    assert f"whoever reaches --listen = {address}" in caplog.text


@pytest.mark.parametrize("command", [GatewayOptions, VisionOptions, LanguageOptions])
def test_a_token_is_shown_nowhere(command: Any) -> None:
    required = {"model": Path("m"), "vision_workers": ["a:1"], "language_workers": ["a:1"]}
    options = command(cluster_token=TOKEN, **{name: value for name, value in required.items() if name in command.model_fields})
    shown = f"{effective_values(options)} {options!r} {as_arguments(options, command)} {read_credentials(options)!r}"
    assert TOKEN not in shown


def test_only_the_exact_token_is_accepted() -> None:
    credentials = Credentials(TOKEN)
    assert credentials.accepts(credentials.headers["Authorization"])
    assert credentials.accepts(credentials.metadata[0][1].encode())
    for wrong in (None, "", TOKEN, f"Bearer {TOKEN}x", f"bearer {TOKEN}", f"Bearer {TOKEN[:-1]}", b"\xff", "Bearer ü"):
        assert not credentials.accepts(wrong)
    assert OPEN.accepts(None)
    assert credentials.derive_key("a") != credentials.derive_key("b")

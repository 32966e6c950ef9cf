"""What protects the connections between processes: the cluster token and TLS, as options and as credentials in force.

Every connection between processes takes its `Credentials` from here. A Unix socket is protected by the permissions of its
folder; it uses the token if there is one, and never TLS.
"""

import hashlib
import hmac
import ipaddress
import logging
import os
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field, SecretStr

from common.options import PREFIX, ConfigError, Options

log = logging.getLogger("dvd.security")

TOKEN_VARIABLE = f"{PREFIX}CLUSTER_TOKEN"
HEADER = "authorization"
_MIN_TOKEN_LENGTH = 16
_MAX_TOKEN_LENGTH = 512
_CHECK_INTERVAL_SECONDS = 1.0
"""Time between two looks at the files of TLS, which an operator may replace at any time."""


class PeerOptions(Options):
    """Options of a command that connects to processes of the cluster."""

    cluster_token: SecretStr | None = Field(
        None, description="secret shared by all processes, at least 16 characters: give it by variable or file, not as a flag"
    )
    cluster_token_file: Path | None = Field(None, description="file with the cluster token")
    tls_cert: Path | None = Field(None, description="certificate chain of this process in PEM; unset: no TLS")
    tls_key: Path | None = Field(None, description="private key of --tls-cert in PEM")
    tls_ca: Path | None = Field(None, description="authorities whose certificates the other processes must have, in PEM")
    tls_name: str | None = Field(
        None, max_length=253, description="name in the certificates of workers; unset: the host that is connected to"
    )


class ProcessOptions(PeerOptions):
    """Options of a process that other processes connect to."""

    insecure: bool = Field(
        False, description="accept anyone who reaches a worker's port of this process, without cluster token and without TLS"
    )


@dataclass(frozen=True)
class TlsFiles:
    """Files of a process' TLS: its certificate chain, its private key and the authorities that it trusts; see `PeerOptions`."""

    cert: Path
    key: Path
    ca: Path
    name: str | None = None

    def version(self) -> tuple[tuple[int, int], ...]:
        """Return a value that changes when a file is replaced. Raises: `OSError`."""
        status = [os.stat(path) for path in (self.cert, self.key, self.ca)]
        return tuple((file.st_mtime_ns, file.st_ino) for file in status)

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Return key, certificate chain and authorities. Raises: `OSError`."""
        return self.key.read_bytes(), self.cert.read_bytes(), self.ca.read_bytes()

    def client_context(self) -> ssl.SSLContext:
        """Return a context for connections to other processes. Raises: `OSError`, of which `ssl.SSLError` is one."""
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=str(self.ca))
        context.load_cert_chain(self.cert, self.key)
        return context


@dataclass(frozen=True)
class Credentials:
    """How a process proves to others that it belongs to the cluster, and what it demands of them.

    Attributes:
        token: The cluster token; None: none is sent or demanded.
        tls: Files of TLS; None: plain connections.
    """

    token: str | None = field(default=None, repr=False)
    tls: TlsFiles | None = None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """GRPC metadata of a call to another process."""
        return ((HEADER, f"Bearer {self.token}"),) if self.token else ()

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers of a request to another process."""
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    def accepts(self, authorization: str | bytes | None) -> bool:
        """Return whether a request with this `Authorization` may be served. Takes the same time for every wrong token."""
        if not self.token:
            return True
        value = authorization.encode(errors="replace") if isinstance(authorization, str) else authorization or b""
        return hmac.compare_digest(value, f"Bearer {self.token}".encode())

    def derive_key(self, purpose: str) -> bytes | None:
        """Return a key for one purpose, from which the token cannot be computed; None without a token."""
        return hmac.digest(self.token.encode(), purpose.encode(), "sha256") if self.token else None


OPEN = Credentials()
"""Neither token nor TLS."""

TOKEN_REJECTED = "missing or wrong cluster token: start every process with the same DVD_CLUSTER_TOKEN"  # noqa: S105  # a message


class TlsClock:
    """Tells, at most once a second, whether the files of TLS have been replaced since the last answer."""

    def __init__(self, tls: TlsFiles | None) -> None:
        self._tls = tls
        self._version = tls.version() if tls else ()
        self._next_check = time.monotonic() + _CHECK_INTERVAL_SECONDS

    def has_changed(self) -> bool:
        """Return True once after each replacement. Files that are missing meanwhile count as unchanged."""
        now = time.monotonic()
        if self._tls is None or now < self._next_check:
            return False
        self._next_check = now + _CHECK_INTERVAL_SECONDS
        try:
            version = self._tls.version()
        except OSError:
            return False
        changed, self._version = version != self._version, version
        return changed


def read_credentials(options: PeerOptions) -> Credentials:
    """Return the credentials that options name.

    Raises:
        ConfigError: The options contradict each other, a file cannot be read, or the token is too short.
    """
    return Credentials(_read_token(options), _read_tls(options))


def check_listeners(options: ProcessOptions, credentials: Credentials, listeners: Mapping[str, str | None]) -> None:
    """Check that no stranger can use a listener of this process.

    Args:
        options: Options of the process.
        credentials: Its credentials.
        listeners: Address of each listener that trusts whoever reaches it, by the flag that sets it; None: it has none.

    Raises:
        ConfigError: Other machines can reach a listener, and it demands neither a token nor a certificate.
    """
    exposed = {flag: address for flag, address in listeners.items() if address and not is_private(address)}
    if not exposed or credentials.token or credentials.tls:
        return
    names = ", ".join(f"{flag} = {address}" for flag, address in exposed.items())
    if not options.insecure:
        raise ConfigError(
            f"{names}: other machines can reach it, and it would trust all of them. Set {TOKEN_VARIABLE} "
            "(or --cluster-token-file), or --tls-cert, --tls-key and --tls-ca; --insecure accepts anyone"
        )
    log.warning("--insecure: whoever reaches %s can use this process, without a token and without TLS", names)


def is_private(address: str) -> bool:
    """Return whether only this machine can reach a listener: a Unix socket, or a loopback address."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def scope_of(credential: str) -> bytes:
    """Return the scope of the caller with a credential: who has another one shares nothing with it."""
    return hashlib.sha256(credential.encode()).digest()


def _read_token(options: PeerOptions) -> str | None:
    if options.cluster_token is not None and options.cluster_token_file is not None:
        raise ConfigError("--cluster-token and --cluster-token-file are both set: expected one of them")
    if options.cluster_token_file is not None:
        source = f"--cluster-token-file {options.cluster_token_file}"
        try:
            token = options.cluster_token_file.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{source} cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    elif options.cluster_token is not None:
        source, token = TOKEN_VARIABLE, options.cluster_token.get_secret_value().strip()
    else:
        return None
    if not (
        _MIN_TOKEN_LENGTH <= len(token) <= _MAX_TOKEN_LENGTH and token.isascii() and token.isprintable() and " " not in token
    ):
        raise ConfigError(
            f"{source}: expected {_MIN_TOKEN_LENGTH} to {_MAX_TOKEN_LENGTH} printable ASCII characters without spaces; "
            "openssl rand -hex 32 prints a good one"
        )
    return token


def _read_tls(options: PeerOptions) -> TlsFiles | None:
    paths = {"--tls-cert": options.tls_cert, "--tls-key": options.tls_key, "--tls-ca": options.tls_ca}
    if missing := [flag for flag, path in paths.items() if path is None]:
        if len(missing) < len(paths):
            raise ConfigError(f"{' and '.join(missing)} missing: --tls-cert, --tls-key and --tls-ca belong together")
        return None
    assert options.tls_cert is not None
    assert options.tls_key is not None
    assert options.tls_ca is not None
    tls = TlsFiles(options.tls_cert, options.tls_key, options.tls_ca, options.tls_name)
    try:
        tls.client_context()
    except OSError as error:
        raise ConfigError(f"--tls-cert, --tls-key, --tls-ca: {error.strerror or error}") from None
    return tls

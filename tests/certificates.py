"""Certificates for tests, made by `cryptography`."""

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from common.security import Credentials, TlsFiles

_DAY = datetime.timedelta(days=1)


@dataclass
class Authority:
    """An authority that issues certificates into files of a folder."""

    folder: Path
    name: str = "test authority"

    def __post_init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)])
        builder = _builder(self._subject, self._subject, self._key, expired=False)
        certificate = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        self.file = self.folder / f"{self.name.replace(' ', '-')}.pem"
        self.file.write_bytes(certificate.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, *, host: str = "127.0.0.1", expired: bool = False, ca: Path | None = None) -> TlsFiles:
        """Issue a certificate for an address or a host name, into files named by `name`, which are replaced."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        try:
            general: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            general = x509.DNSName(host)
        builder = _builder(subject, self._subject, key, expired=expired)
        certificate = builder.add_extension(x509.SubjectAlternativeName([general]), critical=False)
        files = TlsFiles(self.folder / f"{name}.pem", self.folder / f"{name}.key", ca or self.file)
        files.cert.write_bytes(certificate.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        files.key.write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        return files

    def credentials(self, name: str, **options: object) -> Credentials:
        """Issue a certificate and return it as credentials; the arguments are those of `issue`."""
        return Credentials(None, self.issue(name, **options))  # type: ignore[arg-type]


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, *, expired: bool
) -> x509.CertificateBuilder:
    end = datetime.datetime.now(datetime.UTC) + (-_DAY if expired else _DAY)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(end - 2 * _DAY)
        .not_valid_after(end)
    )

"""Who the server of the stream is: a certificate made for the run, or the user's own.

Clients pin the one certificate: it is the only one that they trust, whoever signed it, and it reaches them over
Flower's own connection. So a self-signed one is as good as any, and of a chain only the first certificate matters.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes, PrivateKeyTypes
from cryptography.x509.oid import NameOID

_CLOCK_SKEW = timedelta(hours=1)


class CertificateError(ValueError):
    """Files that the server cannot show as its certificate; the text says which, why, and what to do."""


@dataclass(frozen=True)
class Identity:
    """What a server proves itself with.

    Parameters
    ----------
    certificate : bytes
        PEM; the server's own certificate stands first, those that signed it may follow.
    private_key : bytes
        PEM, not encrypted.
    name : str
        DNS name or IP address that the certificate is made out to.
    """

    certificate: bytes
    private_key: bytes = field(repr=False)
    name: str

    @property
    def pin(self) -> str:
        """The server's own certificate alone, PEM: what clients trust."""
        return _pem(x509.load_pem_x509_certificate(self.certificate)).decode()


def make_identity(name: str, days: int = 30) -> Identity:
    """A self-signed certificate and its key (EC, P-256).

    Parameters
    ----------
    name : str
        DNS name or IP address that it is made out to.
    days : int
        How long it is valid, at least 1. It is valid from one hour ago, as clocks differ.

    Raises
    ------
    ValueError
        If ``days`` is below 1, or ``name`` is empty or not in ASCII.
    """
    if days < 1:
        raise ValueError(f"days={days}: a certificate must be valid for at least 1 day")
    if not name or not name.isascii():
        raise ValueError(f"name={name!r}: a certificate is made out to an IP address or a DNS name in ASCII")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "HSplitLoRA server shard")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([_general_name(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private_key = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Identity(_pem(certificate), private_key, name)


def read_identity(certificate_file: str | Path, key_file: str | Path) -> Identity:
    """The user's own certificate and key.

    Parameters
    ----------
    certificate_file : str or Path
        PEM; the server's own certificate first. It may be signed by anyone, and nothing need follow: clients trust
        this one certificate, so gRPC asks for no chain up to a root.
    key_file : str or Path
        PEM, not encrypted.

    Raises
    ------
    CertificateError
        If a file cannot be read or holds something else, the key is encrypted or of another certificate, its kind is
        none that gRPC serves, the certificate is not valid now, or it names no host.
    """
    certificate_file, key_file = Path(certificate_file), Path(key_file)
    chain, key_pem = _read("transport.certificate", certificate_file), _read("transport.private_key", key_file)
    try:
        certificates = x509.load_pem_x509_certificates(chain)
    except ValueError as error:
        raise CertificateError(
            f"transport.certificate={certificate_file} is not a PEM certificate ({error}); "
            "it must begin with -----BEGIN CERTIFICATE-----"
        ) from None
    own, key = certificates[0], _load_key(key_pem, key_file)
    if own.public_key() != key.public_key():
        elsewhere = any(certificate.public_key() == key.public_key() for certificate in certificates)
        remedy = "put the server's own certificate first" if elsewhere else "name the key that it was made with"
        raise CertificateError(
            f"transport.private_key={key_file} does not fit the first certificate of "
            f"transport.certificate={certificate_file}; {remedy}"
        )
    if not _served(own.public_key()):
        raise CertificateError(
            f"transport.private_key={key_file} is of a kind that gRPC does not serve; use RSA, EC P-256 or EC P-384"
        )
    now = datetime.now(UTC)
    if not own.not_valid_before_utc <= now <= own.not_valid_after_utc:
        state = "has expired" if now > own.not_valid_after_utc else "is not yet valid"
        raise CertificateError(
            f"transport.certificate={certificate_file} {state}: it is valid from {own.not_valid_before_utc} to "
            f"{own.not_valid_after_utc}, and now is {now:%Y-%m-%d %H:%M:%S%z}; renew it, or check the clock"
        )
    return Identity(chain, key_pem, _name(own, certificate_file))


def _read(setting: str, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CertificateError(f"{setting}={file} cannot be read: {error.strerror or error}") from None


def _load_key(pem: bytes, file: Path) -> PrivateKeyTypes:
    try:
        return serialization.load_pem_private_key(pem, password=None)
    except TypeError:
        raise CertificateError(
            f"transport.private_key={file} is encrypted, and nobody is there to type its password; "
            "write it without one: openssl pkey -in KEY -out PLAIN"
        ) from None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CertificateError(
            f"transport.private_key={file} is not a PEM private key ({error}); "
            "it must begin with -----BEGIN PRIVATE KEY----- or alike"
        ) from None


def _served(key: CertificatePublicKeyTypes) -> bool:
    """Whether gRPC's TLS signs with keys of this kind."""
    if isinstance(key, ec.EllipticCurvePublicKey):
        return isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1)
    return isinstance(key, rsa.RSAPublicKey)


def _name(certificate: x509.Certificate, file: Path) -> str:
    """The first DNS name that a certificate is made out to, else the first IP address."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = x509.SubjectAlternativeName([])
    hosts = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
    if not hosts:
        raise CertificateError(
            f"transport.certificate={file} names no host: make it with a subject alternative name, DNS or IP "
            "(openssl req -addext subjectAltName=DNS:HOST)"
        )
    return hosts[0]


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)

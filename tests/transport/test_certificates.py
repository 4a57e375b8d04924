"""Certificates: made for a run, or read from files that may be wrong in many ways."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from hsplitlora_flwr.transport.certificates import CertificateError, Identity, make_identity, read_identity
from tests.transport.pki import Key, certificate, p256, pem


def read(folder: Path, chain: bytes, key: bytes) -> Identity:
    (folder / "cert.pem").write_bytes(chain)
    (folder / "key.pem").write_bytes(key)
    return read_identity(folder / "cert.pem", folder / "key.pem")


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [
        ("shard.example.org", x509.DNSName, "shard.example.org"),
        ("10.1.2.3", x509.IPAddress, ipaddress.ip_address("10.1.2.3")),
        ("fe80::1", x509.IPAddress, ipaddress.ip_address("fe80::1")),
    ],
)
def test_a_certificate_made_for_a_run(tmp_path: Path, name: str, kind: type, value: object) -> None:
    identity = make_identity(name, days=3)
    made = x509.load_pem_x509_certificate(identity.certificate)
    made.verify_directly_issued_by(made)
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [(type(item), item.value) for item in names] == [(kind, value)]
    assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca  # it can sign no other
    assert isinstance(made.signature_hash_algorithm, hashes.SHA256)
    before, after = made.not_valid_before_utc - datetime.now(UTC), made.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(minutes=-65) < before <= timedelta(hours=-1)
    assert timedelta(days=3, minutes=-5) < after <= timedelta(days=3)
    assert read(tmp_path, identity.certificate, identity.private_key) == identity  # the key fits, the name is found
    assert "PRIVATE" not in repr(identity)


def test_no_two_runs_share_a_key() -> None:
    assert make_identity("shard").private_key != make_identity("shard").private_key


@pytest.mark.parametrize(("name", "days", "says"), [("shard", 0, "days=0"), ("", 1, "name=''"), ("bücher", 1, "ASCII")])
def test_what_no_certificate_is_made_for(name: str, days: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_identity(name, days)


@pytest.mark.parametrize(
    ("names", "name"),
    [
        ((x509.IPAddress(ipaddress.ip_address("10.0.0.1")), x509.DNSName("b"), x509.DNSName("a")), "b"),
        ((x509.RFC822Name("x@y.org"), x509.IPAddress(ipaddress.ip_address("::1"))), "::1"),
    ],
)
def test_the_name_is_the_first_dns_name_else_the_first_address(
    tmp_path: Path, names: tuple[x509.GeneralName, ...], name: str
) -> None:
    key = p256()
    assert read(tmp_path, certificate(key, names), pem(key)).name == name


@pytest.mark.parametrize(
    "key", [ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(public_exponent=65537, key_size=2048)]
)
def test_other_keys_that_grpc_serves(tmp_path: Path, key: Key) -> None:
    assert read(tmp_path, certificate(key), pem(key)).name == "shard.example.org"


def test_the_first_certificate_of_a_chain_is_pinned(tmp_path: Path) -> None:
    authority, key = p256(), p256()
    own, above = certificate(key, issuer=authority), certificate(authority)
    assert read(tmp_path, own + above, pem(key)).pin.encode() == own
    with pytest.raises(CertificateError, match="put the server's own certificate first"):
        read(tmp_path, above + own, pem(key))


KEY = p256()


@pytest.mark.parametrize(
    ("chain", "key", "says"),
    [
        (b"", pem(KEY), r"transport\.certificate=.*cert\.pem is not a PEM certificate"),
        (pem(KEY), pem(KEY), r"transport\.certificate=.*cert\.pem is not a PEM certificate"),
        (certificate(KEY), b"\x00\x01", r"transport\.private_key=.*key\.pem is not a PEM private key"),
        (certificate(KEY), certificate(KEY), r"transport\.private_key=.*key\.pem is not a PEM private key"),
        (certificate(KEY), pem(KEY, b"secret"), r"key\.pem is encrypted.* openssl pkey"),
        (certificate(KEY), pem(p256()), "does not fit the first certificate of .* name the key that it was made with"),
        (certificate(KEY, days=(-3, -2)), pem(KEY), r"cert\.pem has expired: it is valid from .* renew it"),
        (certificate(KEY, days=(2, 3)), pem(KEY), r"cert\.pem is not yet valid: .* check the clock"),
        (certificate(KEY, ()), pem(KEY), "names no host: .*subjectAltName"),
        (certificate(KEY, (x509.RFC822Name("x@y.org"),)), pem(KEY), "names no host"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, chain: bytes, key: bytes, says: str) -> None:
    with pytest.raises(CertificateError, match=says):
        read(tmp_path, chain, key)


@pytest.mark.parametrize("key", [ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP521R1())])
def test_keys_that_grpc_does_not_serve(tmp_path: Path, key: Key) -> None:
    with pytest.raises(CertificateError, match="use RSA, EC P-256 or EC P-384"):
        read(tmp_path, certificate(key), pem(key))


def test_missing_files(tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_bytes(certificate(KEY))
    for files, setting in (
        ((tmp_path / "no.pem", tmp_path), "certificate"),
        ((tmp_path / "cert.pem", tmp_path / "no.pem"), "private_key"),
    ):
        with pytest.raises(CertificateError, match=rf"transport\.{setting}=.*no\.pem cannot be read: No such file"):
            read_identity(*files)

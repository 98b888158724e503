"""Certificates: a project's own authority, and the server's key that it vouches for.

ECDSA on P-256 for TLS 1.3. The authority's key never leaves the state folder; sites know the
authority by its fingerprint, which is part of their enrolment token.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from atoll.errors import ConfigurationError, require

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

logger = logging.getLogger("atoll.service")
AUTHORITY_YEARS = 10
SERVER_DAYS, RENEW_DAYS = 397, 30
#: Names of hosts, of letters, digits and dashes between dots; the first part may be a star.
NAME = re.compile(r"(?:\*\.)?(?!-)[A-Za-z0-9_-]{1,63}(?:\.(?!-)[A-Za-z0-9_-]{1,63})*")


def make_authority(folder: Path, project: str) -> None:
    """Write `ca.pem` and `ca-key.pem` for a new project."""
    x509 = require("cryptography.x509", "atoll[serve]", "a project's authority")
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"atoll project {project}")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=365 * AUTHORITY_YEARS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(folder, "ca", key, certificate)


def check_hosts(hosts: Sequence[str]) -> None:
    """Raise `ConfigurationError` unless a certificate can be for these names and addresses."""
    if not hosts:
        raise ConfigurationError("a server's certificate is for one host at least")
    for host in hosts:
        if not NAME.fullmatch(host) and _address(host) is None:
            raise ConfigurationError(
                f"{host!r} is no host: give a name or an address, e.g. fl.example.org or 10.0.0.7, "
                "without https:// and without a port"
            )


def make_server(folder: Path, hosts: Sequence[str]) -> None:
    """Write `server.pem` and `server-key.pem`, vouched for by the authority, for these hosts."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    check_hosts(hosts)
    authority = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    signer = serialization.load_pem_private_key((folder / "ca-key.pem").read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, hosts[0][:64])]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(min(now + timedelta(days=SERVER_DAYS), authority.not_valid_after_utc))
        .add_extension(x509.SubjectAlternativeName([_host(h) for h in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
        )
        .sign(signer, hashes.SHA256())
    )
    _write(folder, "server", key, certificate)


def hosts_of(folder: Path) -> list[str]:
    """The names and addresses that the server's certificate is for."""
    from cryptography import x509

    old = x509.load_pem_x509_certificate((folder / "server.pem").read_bytes())
    names = old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def renew_server(folder: Path) -> bool:
    """Make a new server certificate for the same hosts if the old one is about to end.

    Without the authority's key, which may be kept elsewhere, that is said in the log, and raises
    `ConfigurationError` once the certificate has ended.
    """
    from cryptography import x509

    path = folder / "server.pem"
    if not path.exists():
        raise ConfigurationError(f"{folder} is not a state folder; make one with: atoll init")
    end = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    left = end - datetime.now(UTC)
    if left > timedelta(days=RENEW_DAYS):
        return False
    if not (folder / "ca-key.pem").exists():
        text = (
            f"the server's certificate ends on {end:%Y-%m-%d}, and {folder / 'ca-key.pem'} is not "
            "there to make another: put it back"
        )
        if left < timedelta(0):
            raise ConfigurationError(text)
        logger.warning("%s before then", text)
        return False
    make_server(folder, hosts_of(folder))
    logger.info("the server's certificate was renewed; the last one was good until %s", end)
    return True


def fingerprint(pem: bytes) -> str:
    """SHA-256 (hex) of a certificate in PEM."""
    try:
        return sha256(ssl.PEM_cert_to_DER_cert(pem.decode("ascii"))).hexdigest()
    except ValueError as error:
        raise ConfigurationError(f"the authority's certificate cannot be read: {error}") from None


def server_context(folder: Path) -> ssl.SSLContext:
    """TLS 1.3 and nothing older, with the project's server certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(folder / "server.pem", folder / "server-key.pem")
    return context


def client_context(authority: bytes | None) -> ssl.SSLContext:
    """TLS 1.3 to a server that this authority vouches for; None asks the system's authorities."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if authority is None:
        context.load_default_certs()
    else:
        context.load_verify_locations(cadata=authority.decode("ascii"))
    return context


def write_secret(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read, and never one that others could for a moment."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _write(
    folder: Path, name: str, key: EllipticCurvePrivateKey, certificate: x509.Certificate
) -> None:
    from cryptography.hazmat.primitives import serialization

    write_secret(
        folder / f"{name}-key.pem",
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )
    (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _host(name: str) -> x509.GeneralName:
    from cryptography import x509

    address = _address(name)
    return x509.DNSName(name) if address is None else x509.IPAddress(address)


def _usage(*, signs: bool) -> x509.KeyUsage:
    from cryptography import x509 as module

    return module.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )

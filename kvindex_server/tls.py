"""TLS of the gRPC ports: server certificate, client certificates, and their rotation without a restart."""

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from kvindex_server.files import Rotated


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of one port. With `client_ca` callers must show a certificate that it signed."""

    cert: Path
    key: Path
    client_ca: Path | None = None


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Credentials that follow the files: a new connection gets what they say now. OSError, ValueError when unfit."""
    paths = [files.cert, files.key, *([files.client_ca] if files.client_ca else [])]
    configuration = Rotated(paths, lambda: _configuration(files))
    handed_over = configuration.value

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal handed_over
        now = configuration.value
        if now is handed_over:
            return None  # as before
        handed_over = now
        return now

    return grpc.dynamic_ssl_server_credentials(handed_over, fetch, files.client_ca is not None)


def _configuration(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    # gRPC would take a key that does not fit, and then refuse every connection.
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(files.cert, files.key, password=_no_password)
    except ssl.SSLError as error:
        raise ValueError(f"{files.cert}, {files.key}: {error.reason or 'not a certificate and its key'}") from None
    client_ca = None
    if files.client_ca is not None:
        client_ca = files.client_ca.read_bytes()
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=client_ca.decode("ascii"))
        except ssl.SSLError:
            raise ValueError(f"{files.client_ca}: no PEM certificates") from None
    return grpc.ssl_server_certificate_configuration([(files.key.read_bytes(), files.cert.read_bytes())], client_ca)


def _no_password() -> str:
    raise ValueError("the private key must not be encrypted")

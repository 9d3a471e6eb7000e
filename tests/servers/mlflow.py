"""A real MLflow server with PostgreSQL behind nginx with Basic Auth, as `docker/compose.tracking.yaml` has it."""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.servers.processes import free_ports

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / ".cache" / "mlflow" / "bin" / "mlflow"
USER, PASSWORD = "tests", "a-password-of-nobody"
_MAIN = """
daemon off; pid {folder}/nginx.pid; error_log {folder}/nginx.log; worker_processes 1; {user}
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    include {folder}/default.conf;
}}
"""


def need(*names: str) -> str:
    """The path of the first of these programs that is there; skips without any."""
    for name in names:
        places = [Path(name)] if "/" in name else [Path(found) for found in [shutil.which(name)] if found]
        for pattern in ("/usr/sbin", "/usr/lib/postgresql/15/bin", "/usr/lib/postgresql/16/bin"):
            places.append(Path(pattern) / name)
        if found := next((place for place in places if place.exists()), None):
            return str(found)
    pytest.skip(f"there is no {' or '.join(names)}: scripts/test.sh installs it")


@dataclass
class TrackingServer:
    """The server's processes. MLflow alone may be stopped and started again: what it knows is in PostgreSQL."""

    folder: Path
    port: int  # of nginx
    mlflow_port: int
    postgres_port: int
    artifacts: str
    of_artifacts: Mapping[str, str] = field(default_factory=dict)  # what MLflow needs to know about their bucket
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environ(self) -> dict[str, str]:
        """What a worker needs to log here."""
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": USER,
            "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        }

    def query(self, sql: str) -> list[list[str]]:
        """The rows that PostgreSQL answers, as text."""
        command = [need("psql"), "-h", "127.0.0.1", "-p", str(self.postgres_port), "-U", "postgres", "-AtF", "\t", "-c"]
        done = subprocess.run([*command, sql], capture_output=True, text=True, timeout=30, check=True)
        return [line.split("\t") for line in done.stdout.splitlines()]

    def metrics(self, run_id: str) -> dict[str, list[int]]:
        """Metric to all steps that the database has of it, as often as it has them, ascending."""
        found: dict[str, list[int]] = {}
        for key, step in self.query(f"select key, step from metrics where run_uuid = '{run_id}' order by key, step"):
            found.setdefault(key, []).append(int(step))
        return found

    def start_mlflow(self) -> None:
        """Start it; `wait` tells when it answers."""
        log = (self.folder / "mlflow.log").open("ab")
        self.processes["mlflow"] = subprocess.Popen(
            [
                str(PROGRAM), "server", "--host", "127.0.0.1", "--port", str(self.mlflow_port), "--workers", "1",
                "--backend-store-uri", f"postgresql+psycopg2://postgres@127.0.0.1:{self.postgres_port}/postgres",
                "--artifacts-destination", self.artifacts,
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PYTHON"))},
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                "MLFLOW_DISABLE_TELEMETRY": "true",
                "HOME": str(self.folder),
                **self.of_artifacts,
            },
            preexec_fn=_die_with_parent,
            start_new_session=True,
        )  # fmt: skip
        log.close()

    def kill_mlflow(self) -> None:
        """As a crash would."""
        process = self.processes["mlflow"]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)

    def wait(self, seconds: float = 300) -> None:
        """Until MLflow answers through nginx."""
        until = time.monotonic() + seconds
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.mlflow_port}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                if time.monotonic() > until or self.processes["mlflow"].poll() is not None:
                    pytest.fail(f"MLflow does not start:\n{(self.folder / 'mlflow.log').read_text()[-3000:]}")
                time.sleep(0.2)

    def stop(self) -> None:
        if "mlflow" in self.processes:
            self.kill_mlflow()
        for name in ("nginx", "postgres"):
            if process := self.processes.get(name):
                process.send_signal(signal.SIGINT)  # postgres: fast shutdown
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


@contextlib.contextmanager
def running(artifacts: str, of_artifacts: Mapping[str, str]) -> Iterator[TrackingServer]:
    """MLflow with PostgreSQL and a bucket for artifacts, behind nginx with Basic Auth."""
    if not PROGRAM.exists():
        pytest.skip(f"there is no {PROGRAM}: scripts/test.sh installs it")
    need("nginx"), need("postgres")
    with tempfile.TemporaryDirectory(prefix="wmtp-mlflow-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL does not run as root
        ports = free_ports(3)
        server = TrackingServer(folder, *ports, artifacts, of_artifacts)
        try:
            _start_postgres(server)
            server.start_mlflow()
            server.processes["nginx"] = _start_nginx(server, folder, server.port)
            server.wait()
            yield server
        finally:
            server.stop()


def _start_postgres(server: TrackingServer) -> None:
    data = server.folder / "postgres"
    data.mkdir()
    who = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
    if who:
        shutil.chown(data, "postgres", "postgres")
    subprocess.run(
        [need("initdb"), "-D", str(data), "-U", "postgres", "--auth=trust", "--no-sync", "-E", "UTF8", "--locale=C"],
        check=True, capture_output=True, timeout=180, cwd="/", **who,
    )  # fmt: skip
    options = ("-h", "127.0.0.1", "-p", str(server.postgres_port), "-k", str(data), "-F")
    with (server.folder / "postgres.log").open("wb") as log:
        server.processes["postgres"] = subprocess.Popen(
            [need("postgres"), "-D", str(data), *options],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", preexec_fn=_die_with_parent, **who,
        )  # fmt: skip
    _wait_for(server.postgres_port, server.processes["postgres"], server.folder / "postgres.log")
    until = time.monotonic() + 300
    while True:  # the port is open before the database is
        try:
            server.query("select 1")
            return
        except subprocess.CalledProcessError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


@contextlib.contextmanager
def tls(server: TrackingServer) -> Iterator[tuple[str, Path]]:
    """A second nginx before the same server, with TLS: its address, and the certificate to believe in."""
    folder, [port] = server.folder / "behind-tls", free_ports(1)
    (folder / "tls").mkdir(parents=True)
    folder.chmod(0o755)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
         "-keyout", folder / "tls" / "server.key", "-out", folder / "tls" / "server.pem"],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    process = _start_nginx(server, folder, port, tls=True)
    try:
        yield f"https://localhost:{port}", folder / "tls" / "server.pem"
    finally:
        process.terminate()
        process.wait(20)


def _start_nginx(server: TrackingServer, folder: Path, port: int, *, tls: bool = False) -> "subprocess.Popen[bytes]":
    hashed = subprocess.run(["openssl", "passwd", "-6", PASSWORD], capture_output=True, text=True, check=True).stdout
    (folder / "htpasswd").write_text(f"{USER}:{hashed}")
    name = "tls.conf" if tls else "no-tls.conf"
    settings = (ROOT / "docker" / "tracking" / name).read_text()
    (folder / name).write_text(settings.replace("/etc/nginx/tracking", str(folder)))
    template = string.Template((ROOT / "docker" / "tracking" / "default.conf.template").read_text())
    upstream = f"127.0.0.1:{server.mlflow_port}"
    (folder / "default.conf").write_text(
        template.safe_substitute(
            TRACKING_LISTEN=f"127.0.0.1:{port}{' ssl' if tls else ''}",
            TRACKING_TLS=f"{folder}/{name}",
            TRACKING_HTPASSWD=f"{folder}/htpasswd",
            TRACKING_UPSTREAM=upstream,
            TRACKING_RESOLVER="127.0.0.1",  # never asked: the upstream is an address
            TRACKING_HOST=upstream,
        )
    )
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(_MAIN.format(folder=folder, user=user))
    with (folder / "nginx.log").open("wb") as log:
        process = subprocess.Popen(
            [need("nginx"), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "nginx.log")],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with_parent,
        )  # fmt: skip
    _wait_for(port, process, folder / "nginx.log")
    return process


def _wait_for(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    until = time.monotonic() + 300
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > until or process.poll() is not None:
                pytest.fail(f"it does not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.05)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)

"""OpenSSH's own server on loopback, for the user of the tests, with keys, home and authorized keys of its own."""

import asyncio
import contextlib
import getpass
import os
import pwd
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.servers.processes import end, free_ports

ROOT = Path(__file__).parents[2]
UNPACKED = ROOT / ".cache" / "sshd"  # scripts/test.sh puts Debian's packages there, uninstalled


@dataclass
class Sshd:
    """`home` is the home of the user there; `client_home` has the keys of who connects, and its known_hosts."""

    port: int
    user: str
    folder: Path
    home: Path
    client_home: Path
    fingerprint: str
    log: Path
    relay: "Relay" = field(repr=False)

    @property
    def address(self) -> str:
        """By way of the relay that counts bytes."""
        return f"{self.user}@127.0.0.1:{self.relay.port}"

    def know(self, key: Path | None = None) -> None:
        """Make the host known, by its own key or another one."""
        kind, text, *_ = (key or self.folder / "host.pub").read_text().split()
        ssh = self.client_home / ".ssh"
        (ssh / "known_hosts").write_text(f"[127.0.0.1]:{self.relay.port} {kind} {text}\n")

    def forget(self) -> None:
        (self.client_home / ".ssh" / "known_hosts").unlink(missing_ok=True)


class Relay(threading.Thread):
    """Passes a TCP port on, counts the bytes of both ways, and cuts all connections when asked to."""

    def __init__(self, target: int) -> None:
        super().__init__(daemon=True)
        self._target = target
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.bytes = 0
        self.connections = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._down = False
        self.start()

    def run(self) -> None:
        asyncio.set_event_loop(self._loop)
        with contextlib.suppress(asyncio.CancelledError, RuntimeError):
            self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._accept, sock=self._socket)
        async with server:
            await server.serve_forever()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._down:
            writer.transport.abort()
            return
        self.connections += 1
        there_reader, there = await asyncio.open_connection("127.0.0.1", self._target)
        self._open |= {writer, there}
        await asyncio.gather(self._copy(reader, there), self._copy(there_reader, writer))
        self._open -= {writer, there}

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                self.bytes += len(data)
                writer.write(data)
                await writer.drain()
        writer.close()

    def cut(self, down: bool = False) -> None:
        """End every connection at once; with `down` take no new ones until `up`."""
        self._down = down

        def abort() -> None:
            for writer in self._open:
                writer.transport.abort()

        self._loop.call_soon_threadsafe(abort)

    def up(self) -> None:
        self._down = False


def _program() -> Path | None:
    unpacked = UNPACKED / "usr/sbin/sshd"
    found = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    return unpacked if unpacked.exists() else Path(found) if found else None


def _environ(folder: Path, home: Path) -> dict[str, str]:
    """As root sshd wants a user `sshd`, and anybody's home is that of /etc/passwd: nss_wrapper gives it others."""
    libraries = next(iter((UNPACKED / "usr/lib").glob("*/libnss_wrapper.so")), None)
    environ = {"PATH": os.environ["PATH"]}
    if libraries is None:
        return environ
    user = pwd.getpwuid(os.getuid())
    (folder / "passwd").write_text(
        f"{user.pw_name}:x:{user.pw_uid}:{user.pw_gid}::{home}:/bin/sh\nsshd:x:65533:65534::/run/sshd:/bin/false\n"
    )
    (folder / "group").write_text(f"{user.pw_name}:x:{user.pw_gid}:\nsshd:x:65534:\n")
    return environ | {
        "LD_LIBRARY_PATH": str(libraries.parent),
        "LD_PRELOAD": str(libraries),
        "NSS_WRAPPER_PASSWD": str(folder / "passwd"),
        "NSS_WRAPPER_GROUP": str(folder / "group"),
    }


def make_key(path: Path) -> str:
    """A new key pair; the fingerprint of it."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "tests", "-f", path], check=True)
    return subprocess.run(["ssh-keygen", "-lf", path], check=True, capture_output=True, text=True).stdout.split()[1]


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    program = _program()
    if program is None or not shutil.which("ssh-keygen"):
        pytest.skip("there is no sshd: scripts/test.sh fetches it from Debian")
    folder = tmp_path_factory.mktemp("sshd")
    home, client_home = folder / "home", folder / "client-home"
    home.mkdir()
    (client_home / ".ssh").mkdir(parents=True)
    fingerprint = make_key(folder / "host")
    make_key(client_home / ".ssh" / "id_ed25519")
    (port,) = free_ports(1)
    # the host's PATH has the wmtp of this environment; its state and its work are all below `home`
    (home / "bin").mkdir()
    wmtp = home / "bin" / "wmtp"
    wmtp.write_text(f'#!/bin/sh\nexec {sys.executable} -m wmtp_worker "$@"\n')
    wmtp.chmod(0o755)
    path = f"{home / 'bin'}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
    variables: dict[str, object] = {"HOME": home, "PATH": path, "PYTHONPATH": ROOT, "AWS_EC2_METADATA_DISABLED": "true"}
    if "DOCKER_HOST" in os.environ:  # the engine of the container tests
        variables["DOCKER_HOST"] = os.environ["DOCKER_HOST"]
    (folder / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder / 'host'}\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"AuthorizedKeysFile {client_home / '.ssh' / 'id_ed25519.pub'}\nPermitRootLogin yes\nLogLevel VERBOSE\n"
        f"PasswordAuthentication no\nKbdInteractiveAuthentication no\nMaxStartups 100\n"
        f"SetEnv {' '.join(f'{name}={value}' for name, value in variables.items())}\n"
    )
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True, mode=0o755)
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [program, "-D", "-e", "-f", folder / "config"],
            env=_environ(folder, home),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
        try:
            _wait(port, process, log)
            yield Sshd(port, getpass.getuser(), folder, home, client_home, fingerprint, log, Relay(port))
        finally:
            end(process)


def _wait(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    until = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > until:
                pytest.fail(f"sshd does not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.05)

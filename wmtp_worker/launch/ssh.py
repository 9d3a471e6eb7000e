"""Another machine over SSH: its key is known or accepted by its fingerprint, ours come from the agent and ~/.ssh."""

import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from wmtp_worker.errors import HostError, SettingsError
from wmtp_worker.launch.shell import Process, Shell

_CONNECT = 30  # seconds
_KEEPALIVE = 15  # seconds; a laptop that slept notices after three of them that the connection is gone


@dataclass(frozen=True)
class Address:
    """`user@host:port`; what is None, ~/.ssh/config says, else the usual."""

    host: str
    user: str | None = None
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises `SettingsError` for what is no address."""
        user, at, rest = text.rpartition("@")
        host, port = rest, ""
        if rest.startswith("["):
            host, _, port = rest[1:].partition("]")
            port = port.removeprefix(":")
        elif rest.count(":") == 1:
            host, _, port = rest.partition(":")
        wrong = not host or (bool(at) and not user) or host.startswith("-") or any(c.isspace() for c in text)
        if wrong or (port and not (port.isdecimal() and 0 < int(port) < 65536)):
            raise SettingsError(f"{text!r} is no address", where="the host", fix="write [user@]host[:port]")
        return cls(host, user or None, int(port) if port else None)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return (f"{self.user}@" if self.user else "") + host + (f":{self.port}" if self.port else "")


class SshShell(Shell):
    """A shell of its own connection for each command: nothing is lost with one that breaks.

    `accepted` is the fingerprint (`SHA256:…`) of a host key that is trusted though ~/.ssh/known_hosts does not have it.
    Raises `SettingsError` where the host's key is another one or unknown, or the host takes none of our keys;
    `HostError` where it cannot be reached.
    """

    def __init__(self, address: Address, accepted: str | None = None, check: Callable[[], None] = lambda: None) -> None:
        super().__init__(check)
        self.where = str(address)
        self._address = address
        self._accepted = accepted

    @contextlib.asynccontextmanager
    async def _open(self, command: Sequence[str]) -> AsyncIterator[Process]:
        import shlex

        ssh = _asyncssh()
        try:
            async with (
                await self._connect(ssh) as connection,
                connection.create_process(shlex.join(command), encoding=None) as process,
            ):

                async def wait() -> int:
                    done = await process.wait()
                    if done.returncode is None:
                        raise HostError(
                            "the connection ended before the command did", where=self.where, fix="try again"
                        )
                    return int(done.returncode)

                yield Process(process.stdin, process.stdout, process.stderr, wait)
                process.close()
        except (ssh.Error, OSError) as error:
            raise HostError(f"the connection is lost: {error}", where=self.where, fix="try again") from error

    async def _connect(self, ssh: Any) -> Any:
        seen: list[str] = []
        accepted = self._accepted

        class Client(ssh.SSHClient):  # type: ignore[misc]
            def validate_host_public_key(self, host: str, addr: str, port: int, key: Any) -> bool:
                seen.append(key.get_fingerprint())
                return bool(seen[-1] == accepted)

        address = self._address
        options = {
            "username": address.user,
            "port": address.port,
            "connect_timeout": _CONNECT,
            "login_timeout": _CONNECT,
            "keepalive_interval": _KEEPALIVE,
            # people see no prompt here
            "password_auth": False,
            "kbdint_auth": False,
        }
        options = {name: value for name, value in options.items() if value is not None}
        try:
            return await ssh.connect(address.host, client_factory=Client, **options)
        except ssh.HostKeyNotVerifiable as error:
            raise self._unverified(seen[-1] if seen else None, str(error)) from error
        except ssh.PermissionDenied as error:
            raise SettingsError(
                f"the host takes none of our keys: {error}",
                where=self.where,
                fix="load the right key into ssh-agent, or name it as IdentityFile in ~/.ssh/config; check the user",
            ) from error
        except (ssh.Error, OSError, TimeoutError) as error:
            raise HostError(
                f"cannot connect: {str(error) or f'no answer in {_CONNECT} s'}", where=self.where, fix="is it up?"
            ) from error

    def _unverified(self, fingerprint: str | None, reason: str) -> SettingsError:
        if fingerprint is None:
            return SettingsError(reason, where=self.where, fix="correct ~/.ssh/known_hosts")
        if self._accepted is not None:
            what = f"the host's key is {fingerprint}, and not {self._accepted}, which was accepted"
            return SettingsError(what, where=self.where, fix="do not go on before you know why it is another")
        return SettingsError(
            f"the host's key is not in ~/.ssh/known_hosts, or is another one there: {fingerprint}",
            where=self.where,
            fix="compare it with what the provider shows, or `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` there; "
            f"if it is the same: --accept-host-key {fingerprint}",
        )


def _asyncssh() -> Any:
    try:
        import asyncssh
    except ImportError as error:
        fix = f"{sys.executable} -m pip install asyncssh"
        raise SettingsError("asyncssh is not installed", fix=fix) from error
    logging.getLogger("asyncssh").setLevel(logging.WARNING)  # it tells of every connection
    return asyncssh

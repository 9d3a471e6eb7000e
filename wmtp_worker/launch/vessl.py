"""A run on VESSL, by its own command `vessl`: the YAML goes to it by stdin, so that no file holds a secret.

VESSL keeps variables marked `secret: true` and does not show them again.
"""

import re
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from wmtp_worker.errors import HostError, InputError, SettingsError
from wmtp_worker.launch.detached import held
from wmtp_worker.launch.host import State, Write
from wmtp_worker.launch.request import Request
from wmtp_worker.launch.shell import Done, Shell
from wmtp_worker.redact import MASK

# VESSL's runs are pods: Kubernetes waits so long between SIGTERM and SIGKILL unless the cluster says otherwise
_GRACE_SECONDS = 30
_POLL = 3.0
_LINES = 1000
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # `vessl` colours whatever it writes to
_LINK = re.compile(r"/runs/[^/\s]+/(\d+)")
_STATUS = re.compile(r"^ *Status +(\S+)", re.MULTILINE)
_PHASES = {"pending": "starting", "terminating": "stopping", "completed": "ended", "terminated": "ended"}


@dataclass(frozen=True)
class Place:
    """Where it runs: names that `vessl cluster list` shows."""

    cluster: str
    preset: str


class Vessl:
    """One run in the default organization and project of `vessl configure`. See `host.Host`.

    Raises `SettingsError` where the command is not installed or not configured, `InputError` where VESSL refuses the
    YAML, `HostError` where it does not answer.
    """

    where = "VESSL"

    def __init__(
        self,
        shell: Shell,
        name: str,
        image: str = "",
        place: Place | None = None,
        number: str | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._shell = shell
        self._name = name
        self._image = image
        self._place = place
        self._number = number
        self._check = check

    def document(self, request: Request, secrets: Mapping[str, str]) -> str:
        """The YAML of the run."""
        assert self._place is not None
        command = f"exec /opt/wmtp/entrypoint/start.sh {shlex.join(request.arguments)}"
        environ: dict[str, Any] = {
            **request.variables,
            "WMTP_WORKDIR": "/workspace",
            "WMTP_RESTART": "always",
            "WMTP_STOP_GRACE_SECONDS": str(_GRACE_SECONDS),
            **{name: {"value": value, "secret": True} for name, value in secrets.items()},
        }
        document = {
            "name": f"wmtp-{request.name}",
            "description": f"run {request.run}, resumed from the bucket",
            "tags": ["wmtp"],
            "resources": {"cluster": self._place.cluster, "preset": self._place.preset},
            "image": self._image,
            "run": [{"workdir": "/workspace", "command": command}],
            "env": environ,
            "termination_protection": False,
        }
        return yaml.safe_dump(document, sort_keys=False, width=4096)

    def preview(self, request: Request) -> str:
        shown = self.document(request, dict.fromkeys(request.secrets, MASK))
        return f"vessl run create -f /dev/stdin, its stdin:\n{shown}"

    def start(self, request: Request) -> Mapping[str, str]:
        if self.find() is not None:
            raise held(request.name, self.where)
        done = self._ask("run", "create", "-f", "/dev/stdin", stdin=self.document(request, request.secrets).encode())
        found = _LINK.search(done.out)
        if found is None:
            raise InputError(
                f"VESSL made no run: {_last(done)}", where=self.where, fix="check --cluster and --resource-preset"
            )
        return {"number": found[1]}

    def find(self) -> Mapping[str, str] | None:
        listed = self._ask("run", "list").out
        found = re.search(rf"(\d+)\W+wmtp-{re.escape(self._name)} .*\b(?:pending|running)\b", listed)
        return None if found is None else {"number": found[1]}

    def state(self) -> State:
        done = self._ask("run", "read", str(self._number))
        found = _STATUS.search(done.out)
        if found is None:
            raise HostError(f"VESSL's words are not understood: {_last(done)}", where=self.where, fix="vessl run read")
        status = found[1].lower()
        code = 0 if status == "completed" else None
        return State(_PHASES.get(status, status), code, f"run {self._number} is {status}")

    def logs(self, write: Write, follow: bool) -> None:
        command = ["vessl", "run", "logs", str(self._number), "--tail", str(_LINES), *(["--follow"] if follow else [])]
        self._checked("logs", self._shell.stream(command, write))

    def stop(self, grace: float) -> State:
        if not (state := self.state()).alive:
            return state
        self._ask("run", "terminate", str(self._number))
        end = time.monotonic() + grace
        while (state := self.state()).alive and time.monotonic() < end:
            self._check()
            time.sleep(_POLL)
        return State("stopping", None, state.detail) if state.alive else state

    def _ask(self, *arguments: str, stdin: bytes = b"") -> Done:
        return self._checked(arguments[1], self._shell.run(["vessl", *arguments], stdin))

    def _checked(self, verb: str, done: Done) -> Done:
        done = Done(done.code, _COLOUR.sub("", done.out), _COLOUR.sub("", done.err))
        if done.code == 0:
            return done
        said = _last(done)
        if re.search(r"configure|access token|unauthorized|invalid token", said, re.IGNORECASE):
            raise SettingsError(f"vessl: {said}", where=self.where, fix="run `vessl configure`")
        raise HostError(f"vessl run {verb}: {said}", where=self.where, fix="try again")


def _last(done: Done) -> str:
    lines = [line for line in (done.out + "\n" + done.err).splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit code {done.code}"

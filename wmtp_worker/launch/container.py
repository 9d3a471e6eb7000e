"""A job in a container of the image, by the `docker` command here or on another machine.

Variables and secrets reach it through a named pipe in the container's memory: they are in no list of processes, not in
what `docker inspect` shows, and not on the engine's disk.
"""

import json
import shlex
from collections.abc import Mapping, Sequence

from wmtp_worker.errors import HostError, InputError, SettingsError, WorkerError
from wmtp_worker.launch.detached import held
from wmtp_worker.launch.host import State, Write, read_on
from wmtp_worker.launch.request import Request
from wmtp_worker.launch.shell import Done, Shell

LABEL = "wmtp.job"
_PIPE = "/dev/shm/wmtp-environment"
_PULL_SECONDS = 3600  # an image of some GB over a slow line
_RECEIVE = f"""\
set -e
mkfifo -m 600 {_PIPE}
lines=$(timeout 120 cat {_PIPE}) || {{ echo "no settings came: launch this job again"; exit 78; }}
rm {_PIPE}
eval "$lines"
unset lines
exec entrypoint.sh "$@"
"""
_DELIVER = f"until [ -p {_PIPE} ]; do sleep 0.1; done; exec cat >{_PIPE}"
# the two streams of a container, as one file of which a part can be had
_SIZE = 'docker logs "$1" 2>&1 | wc -c'
_READ = 'docker logs "$1" 2>&1 | tail -c "+$(($2 + 1))"'
_FOLLOW = 'docker logs -f "$1" 2>&1 | tail -c "+$(($2 + 1))"'
# a second signal would end the worker in the middle of its save: whoever asks again only waits
_TOLD = "/dev/shm/wmtp-told"
_TELL = f"if mkdir {_TOLD} 2>/dev/null; then echo first; else [ -d {_TOLD} ]; fi"
# by the machine's own clock, in one connection. $2: seconds
_WAIT = """\
end=$(($(date +%s) + $2))
while [ "$(docker container inspect --format '{{.State.Running}}' "$1" 2>/dev/null)" = true ]; do
  [ "$(date +%s)" -lt "$end" ] || exit 0
  sleep 0.5
done
"""


class Container:
    """The container `wmtp-NAME` on one engine. See `host.Host`.

    `gpus` is docker's --gpus ("" for none), `options` are further ones of `docker run`, `context` one of
    `docker context ls`. `/workspace` is the volume `volume`.
    """

    def __init__(
        self,
        shell: Shell,
        name: str,
        image: str = "",
        *,
        gpus: str = "all",
        volume: str = "wmtp",
        options: Sequence[str] = (),
        context: str | None = None,
        grace: float = 120,
    ) -> None:
        self._shell = shell
        self._name = f"wmtp-{name}"
        self._job = name
        self._image = image
        self._docker = ["docker", *(["--context", context] if context else [])]
        self._gpus = ["--gpus", gpus] if gpus else []
        self._options = [*self._gpus, "--shm-size", "8g", "--volume", f"{volume}:/workspace", *options]
        self._grace = grace

    def _run(self, request: Request) -> list[str]:
        # docker cannot start it again: it does not know the settings
        told = {"WMTP_STOP_GRACE_SECONDS": f"{self._grace:g}", "WMTP_RESTART": "always"}
        return [
            *self._docker,
            "run",
            "--detach",
            *("--name", self._name),
            *("--label", f"{LABEL}={self._job}"),
            *("--stop-timeout", f"{self._grace:.0f}"),
            *self._options,
            *(word for name, value in told.items() for word in ("--env", f"{name}={value}")),
            *("--entrypoint", "tini"),
            self._image,
            *("-g", "--", "bash", "-c", _RECEIVE, "wmtp-launch", "train"),
            *request.arguments,
        ]

    def _deliver(self) -> list[str]:
        return [*self._docker, "exec", "--interactive", self._name, "sh", "-c", _DELIVER]

    def preview(self, request: Request) -> str:
        shown = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in request.shown().items())
        commands = f"{shlex.join(self._run(request))}\n\n{shlex.join(self._deliver())}"
        return f"on {self._shell.where}:\n{commands}\n\nstdin of the last:\n{shown}"

    def start(self, request: Request) -> Mapping[str, str]:
        before = self._inspect()
        if before is not None:
            if before["State"]["Running"]:
                raise held(self._job, self._shell.where)
            self._docker_run("rm", "--volumes=false", self._name)
        done = self._shell.run(self._run(request), timeout=_PULL_SECONDS)
        if done.code != 0:
            if not _is_taken(done):  # else it is another launch's, which came first
                self._shell.run([*self._docker, "rm", self._name])
            raise self._refused(done)
        delivered = self._shell.run(self._deliver(), request.exports())
        if delivered.code != 0:
            raise HostError(
                f"the container did not take its settings: {_last(delivered)}",
                where=self._shell.where,
                fix=f"docker logs {self._name}",
            )
        return {"container": self._name, "id": done.out.strip()}

    def _refused(self, done: Done) -> WorkerError:
        said, where = done.err.strip(), self._shell.where
        lowered = said.lower()
        if _is_taken(done):
            return held(self._job, where)
        if done.code == 127 or "command not found" in lowered:
            return SettingsError("there is no docker", where=where, fix="install it there, or launch without --image")
        if "could not select device driver" in lowered or "nvidia" in lowered:
            what = f"docker has no GPUs there: {_last(done)}"
            return SettingsError(what, where=where, fix="install the NVIDIA container toolkit, or give --gpus ''")
        if any(
            words in lowered
            for words in ("no such image", "unable to find image", "pull access denied", "manifest unknown")
        ):
            what = f"there is no image {self._image}: {_last(done)}"
            return InputError(what, where=where, fix="push it to a registry that the host may read, or build it there")
        return HostError(f"the container was not started: {_last(done)}", where=where, fix="look after docker there")

    def _docker_run(self, *arguments: str, timeout: float = 120) -> Done:
        done = self._shell.run([*self._docker, *arguments], timeout=timeout)
        if done.code != 0:
            raise HostError(f"docker {arguments[0]}: {_last(done)}", where=self._shell.where, fix="look after it there")
        return done

    def _inspect(self) -> dict[str, dict[str, bool | int | str]] | None:
        """What the engine knows of the container, None where it knows none."""
        done = self._shell.run([*self._docker, "container", "inspect", self._name])
        if done.code == 0:
            found: list[dict[str, dict[str, bool | int | str]]] = json.loads(done.out)
            return found[0]
        if "no such container" in done.err.lower():
            return None
        if done.code == 127 or "command not found" in done.err.lower():
            raise self._refused(done)
        raise HostError(f"docker does not answer: {_last(done)}", where=self._shell.where, fix="is the engine up?")

    def find(self) -> Mapping[str, str] | None:
        return {"container": self._name} if self.state().alive else None

    def state(self) -> State:
        found = self._inspect()
        if found is None:
            return State("unknown", None, "the host knows no such container")
        state = found["State"]
        if state["Running"]:
            return State("running", None, f"container {self._name}")
        detail = "out of memory" if state.get("OOMKilled") else ""
        return State("ended", int(state["ExitCode"]), detail)

    def logs(self, write: Write, follow: bool) -> None:
        script = _FOLLOW if follow else _READ
        read_on(self._shell, self._script(_SIZE), lambda offset: self._script(script, str(offset)), write, follow)

    def _script(self, script: str, *arguments: str) -> list[str]:
        return ["sh", "-c", script.replace("docker", shlex.join(self._docker), 1), "wmtp", self._name, *arguments]

    def stop(self, grace: float) -> State:
        """Never by `docker stop`, whose SIGKILL would cut off a save that takes longer than `grace`."""
        state = self.state()
        if not state.alive:
            return state
        told = self._shell.run([*self._docker, "exec", self._name, "sh", "-c", _TELL])
        if told.code == 0 and told.out.strip() == "first":
            told = self._shell.run([*self._docker, "kill", "--signal", "TERM", self._name])
            if told.code != 0:
                self._shell.run([*self._docker, "exec", self._name, "rmdir", _TOLD])
        if told.code == 0:
            self._shell.run(self._script(_WAIT, f"{grace:.0f}"), timeout=grace + 60)
        state = self.state()
        if state.alive and told.code != 0:
            what = f"the container could not be asked to stop: {_last(told)}"
            raise HostError(what, where=self._shell.where, fix="look after docker there, then ask again")
        return State("stopping", None, state.detail) if state.alive else state


def _is_taken(done: Done) -> bool:
    """Whether docker has a container of that name already."""
    return "already in use" in done.err.lower()


def _last(done: Done) -> str:
    """What docker says last, but for where to find its help."""
    lines = (done.err.strip() or done.out.strip()).splitlines()
    return next((line for line in reversed(lines) if line.strip() and "--help" not in line), f"exit code {done.code}")

"""A job without a container: a process in a session of its own, which no connection's end can end.

On the host a folder `~/.local/state/wmtp/jobs/NAME` has its log, its process id and, at last, its exit code. It is
alive as long as somebody holds the folder's lock: the worker itself does. Secrets come by stdin into the environment of
that process, and are nowhere else.
"""

import shlex
from collections.abc import Mapping

from wmtp_worker.errors import HostError, InputError, RunHeldError
from wmtp_worker.launch.host import State, Write, read_on
from wmtp_worker.launch.request import Request
from wmtp_worker.launch.shell import Done, Shell

# $1: name of the job
_FOLDER = "job=${XDG_STATE_HOME:-$HOME/.local/state}/wmtp/jobs/$1\n"
# $2: work directory, $3: checkout; then the options of `wmtp train`. Exports come by stdin.
_START = (
    _FOLDER
    + r"""
set -eu
umask 077
lines=$(cat)
checkout=$3
export WMTP_WORKDIR=$2 WMTP_ENV_FILE=/dev/null
shift 3
mkdir -p "$job" "$WMTP_WORKDIR"
WMTP_WORKDIR=$(cd "$WMTP_WORKDIR" && pwd)
for tool in flock setsid; do
  command -v $tool >/dev/null || { echo "there is no $tool (Debian: util-linux)"; exit 127; }
done
exec 8>>"$job/lock" # not 9, which start.sh uses and closes
flock -n 8 || exit 79
if [ -f "$checkout/entrypoint/start.sh" ]; then set -- bash "$checkout/entrypoint/start.sh" "$@"
elif command -v wmtp >/dev/null; then set -- wmtp train "$@"
else echo "there is no wmtp, and no checkout in $checkout"; exit 127; fi
rm -rf "$job/pid" "$job/exit" "$job/told"
[ ! -f "$job/log" ] || mv "$job/log" "$job/log.before"
: >"$job/log"
eval "$lines"
unset lines
export job
setsid sh -c '"$@" & echo $! >"$job/pid"; wait $!; echo $? >"$job/exit.new"; mv "$job/exit.new" "$job/exit"' sh "$@" \
  >>"$job/log" 2>&1 </dev/null &
until [ -s "$job/pid" ]; do sleep 0.05; done
echo "$job"
"""
)
_STATE = (
    _FOLDER
    + r"""
[ -d "$job" ] || { echo none; exit 0; }
if ! flock -n "$job/lock" true; then echo "running $(cat "$job/pid")"
elif [ -f "$job/exit" ]; then echo "ended $(cat "$job/exit")"
else echo gone; fi
tail -n 1 "$job/log" 2>/dev/null
"""
)
# the worker alone is told, for it tells its own processes; and once, for a second signal would end it at once, in the
# middle of a save: whoever asks again only waits. $2: seconds
_STOP = (
    _FOLDER
    + r"""
flock -n "$job/lock" true && exit 0
if mkdir "$job/told" 2>/dev/null; then
  kill -TERM "$(cat "$job/pid")" || { rmdir "$job/told"; exit 1; }
fi
flock -w "$2" "$job/lock" true
"""
)
_SIZE = _FOLDER + 'wc -c <"$job/log"'
# what a dead process wrote last is still read; -F would wait for ever
_READ = _FOLDER + 'tail -c "+$(($2 + 1))" -f --pid="$(cat "$job/pid")" -s 0.5 "$job/log"'
_READ_ONCE = _FOLDER + 'tail -c "+$(($2 + 1))" "$job/log"'


class Detached:
    """A job that `wmtp` itself, or a checkout's start.sh, runs on the host. See `host.Host`."""

    def __init__(self, shell: Shell, name: str, workdir: str = "wmtp-work", checkout: str = "wmtp-worker") -> None:
        self._shell = shell
        self._name = name
        self._workdir = workdir
        self._checkout = checkout

    def _command(self, script: str, *arguments: str) -> list[str]:
        return ["sh", "-c", script, "wmtp-launch", self._name, *arguments]

    def _start(self, request: Request) -> list[str]:
        return self._command(_START, self._workdir, self._checkout, *request.arguments)

    def preview(self, request: Request) -> str:
        shown = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in request.shown().items())
        return f"ssh {self._shell.where}, the command:\n{shlex.join(self._start(request))}\n\nits stdin:\n{shown}"

    def start(self, request: Request) -> Mapping[str, str]:
        done = self._shell.run(self._start(request), request.exports())
        if done.code == RunHeldError.exit_code:
            raise held(self._name, self._shell.where)
        if done.code == 127:
            raise InputError(
                done.out.strip() or done.err.strip(),
                where=self._shell.where,
                fix="give --image IMAGE for a host with docker, or --checkout DIR, or install wmtp-worker there",
            )
        if done.code != 0:
            raise _failed("the job could not be started", self._shell.where, done)
        return {"folder": done.out.strip().splitlines()[-1]}

    def find(self) -> Mapping[str, str] | None:
        return {} if self.state().alive else None

    def state(self) -> State:
        done = self._shell.run(self._command(_STATE))
        if done.code != 0 or not done.out:
            raise _failed("the state of the job cannot be read", self._shell.where, done)
        first, _, last = done.out.partition("\n")
        phase, _, number = first.partition(" ")
        if phase == "none":
            return State("unknown", None, "the host knows no such job")
        if phase == "gone":
            return State("gone", None, "killed, or the host was restarted: launch it again, and it goes on")
        return State(phase, int(number) if phase == "ended" else None, last.strip())

    def logs(self, write: Write, follow: bool) -> None:
        script = _READ if follow else _READ_ONCE
        read_on(self._shell, self._command(_SIZE), lambda offset: self._command(script, str(offset)), write, follow)

    def stop(self, grace: float) -> State:
        done = self._shell.run(self._command(_STOP, f"{grace:g}"), timeout=grace + 60)
        state = self.state()
        if state.alive and done.code != 0 and done.err:
            raise _failed("the job could not be asked to stop", self._shell.where, done)
        return State("stopping", None, state.detail) if state.alive else state


def held(name: str, where: str) -> RunHeldError:
    """A job of this name runs there."""
    return RunHeldError(
        f"a job named {name} runs there already", where=where, fix=f"`wmtp launch stop {name}`, or another --name"
    )


def kept(name: str, where: str, way: str) -> RunHeldError:
    """A stopped machine has a job of this name on its disk; `way` is how to start that machine."""
    return RunHeldError(
        f"a stopped machine has a job named {name} on its disk",
        where=where,
        fix=f"{way} goes on with it; `wmtp launch stop {name} --destroy` gives it back",
    )


def _failed(what: str, where: str, done: Done) -> HostError:
    said = (done.err.strip() or done.out.strip() or f"exit code {done.code}").splitlines()[-1]
    return HostError(f"{what}: {said}", where=where, fix="look at the host, then try again")

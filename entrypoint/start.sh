#!/usr/bin/env bash
# The one way in: makes what is missing, then runs `wmtp train`, again where nobody else would. See --help.
set -euo pipefail
# shellcheck source=entrypoint/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=entrypoint/supervise.sh
source "$(dirname "${BASH_SOURCE[0]}")/supervise.sh"

usage() {
  cat <<'TEXT'
start.sh [options of wmtp train]

Makes its own Python environment the first time (.venv at the root, or $WMTP_VENV), then trains.
In the image it uses the image's Python.

  bash entrypoint/start.sh --preset smoke             a small training on the CPU, under a minute
  bash entrypoint/start.sh --preset smoke --resume    go on from the newest checkpoint that verifies
  bash entrypoint/start.sh --recipe baseline --preset local-light --set training.lr=1e-4

Settings also come from the environment and from .env, see .env.example and docs/settings.md.
`.venv/bin/wmtp train --help` has every option.

A worker that ends with 74 or 75, or is killed, is started again with growing pauses; not after a signal to start.sh, nor
when the cloud takes the machine away. In the image's own entrypoint the host does that instead, by the exit code.

  WMTP_RESTART=auto|always|never     who starts again (auto: as above)
  WMTP_RESTART_LIMIT=10              at most so often ...
  WMTP_RESTART_WINDOW=3600           ... in so many seconds
  WMTP_WHEN_DONE=nothing|stop|destroy   what becomes of a rented machine after exit code 0
  WMTP_WHEN_IDLE=nothing|stop           and after any other end, when nothing is started again
  WMTP_DOCTOR=quick|never               whether a rented machine is looked at before the first worker (wmtp doctor)
  touch $WMTP_WORKDIR/STOP           nothing is started here until it is removed

Exit codes: 0 done · 70 a bug · 74 finished, but some work is not safe in the bucket yet · 75 saved, start me again ·
78 settings, credentials or input are wrong, do not restart · 79 another worker holds this run
TEXT
}

# Sets $arguments to "$@" with every bare --resume spelled out: the habit `start.sh --resume` needs no value.
spell_out_resume() {
  arguments=()
  while (($# > 0)); do
    arguments+=("$1")
    if [[ $1 == --resume ]] && [[ $# == 1 || $2 == --* ]]; then arguments+=(auto); fi
    shift
  done
}

# A .env beside the code counts from every directory, unless there is a nearer one.
find_env_file() {
  if [[ -z ${WMTP_ENV_FILE:-} && ! -e .env && -f $WMTP_ROOT/.env ]]; then export WMTP_ENV_FILE=$WMTP_ROOT/.env; fi
}

_main() {
  local argument
  for argument in "$@"; do
    if [[ $argument == --help || $argument == -h ]]; then
      usage
      return
    fi
  done
  adopt_environment
  find_env_file
  spell_out_resume "$@"
  read_policy
  refuse_if_stopped
  local wmtp=wmtp
  if [[ ${WMTP_IMAGE:-} == 1 ]]; then
    find_room_for_caches
  else
    ensure_venv runtime
    wmtp=$venv/bin/wmtp
  fi
  if [[ $WMTP_DOCTOR != never ]] && ! is_fit "$wmtp" ${arguments[@]+"${arguments[@]}"}; then
    say "error: this machine is not fit to train (wmtp doctor)"
    printf '  -> %s\n' "do what it says above, or set WMTP_DOCTOR=never to try all the same" >&2
    leave "$wmtp" 78
    exit 78
  fi
  # the + form: macOS's bash 3.2 takes an empty array for an unset one
  if nothing_follows; then exec "$wmtp" train ${arguments[@]+"${arguments[@]}"}; fi
  supervise "$wmtp" ${arguments[@]+"${arguments[@]}"}
}

_is_sourced() { [[ ${BASH_SOURCE[0]} != "$0" ]]; }

_is_sourced || _main "$@"

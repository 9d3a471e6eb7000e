#!/usr/bin/env bash
# The one way in: makes what is missing, then becomes `wmtp train`. See --help.
set -euo pipefail
# shellcheck source=entrypoint/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

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

Exit codes: 0 done · 70 a bug · 74 finished, but some work is not safe in the bucket yet · 75 saved, start me again ·
78 settings, credentials or input are wrong · 79 another worker holds this run
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
  find_env_file
  spell_out_resume "$@"
  if [[ ${WMTP_IMAGE:-} == 1 ]]; then
    find_room_for_caches
    exec wmtp train ${arguments[@]+"${arguments[@]}"}
  fi
  ensure_venv runtime
  # the + form: macOS's bash 3.2 takes an empty array for an unset one
  exec "$venv/bin/wmtp" train ${arguments[@]+"${arguments[@]}"}
}

_is_sourced() { [[ ${BASH_SOURCE[0]} != "$0" ]]; }

_is_sourced || _main "$@"

#!/usr/bin/env bash
# Is a training alive here? Healthy (0) if the newest heartbeat is young, else 1. Bash alone: it runs every few seconds.
set -euo pipefail

OLDEST=120 # seconds; a heartbeat is written every few

_main() {
  local checkpoints=${WMTP_WORKDIR:-/workspace}/checkpoints file run newest=0 newest_run=
  for file in "$checkpoints"/*/heartbeat.json; do
    # it may vanish or be replaced at any moment
    if [[ $(cat "$file" 2>/dev/null) =~ \"time\":\ *([0-9]+) ]] && ((BASH_REMATCH[1] > newest)); then
      newest=${BASH_REMATCH[1]}
      run=${file%/*}
      newest_run=${run##*/}
    fi
  done
  if ((newest == 0)); then
    echo "no heartbeat under $checkpoints"
    return 1
  fi
  echo "last heartbeat $((EPOCHSECONDS - newest)) s ago, of run $newest_run"
  ((EPOCHSECONDS - newest < OLDEST))
}

_is_sourced() { [[ ${BASH_SOURCE[0]} != "$0" ]]; }

_is_sourced || _main "$@"

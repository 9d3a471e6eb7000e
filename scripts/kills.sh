#!/usr/bin/env bash
# Kills the real worker so many times, at random lines of its code, on every provider, and stops and stalls it on top;
# says what came of it. One line for each chain of strikes tells how far it is; after MINUTES no more chains begin:
#
#   scripts/kills.sh 1000 [SEED [MINUTES]]
#   nohup scripts/kills.sh 1000 7 90 >kills.log 2>&1 &
set -euo pipefail
# shellcheck source=entrypoint/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../entrypoint/lib.sh"

_main() {
  local kills=${1:-1000} seed=${2:-1} minutes=${3:-600}
  if ! [[ $kills =~ ^[1-9][0-9]*$ && $minutes =~ ^[1-9][0-9]*$ ]]; then
    say "usage: scripts/kills.sh KILLS [SEED [MINUTES]]"
    exit 2
  fi
  cd "$WMTP_ROOT"
  ensure_venv dev
  export PATH=$venv/bin:$PATH WMTP_KILLS=$kills WMTP_KILLS_SEED=$seed
  WMTP_KILLS_UNTIL=$(($(date +%s) + 60 * minutes))
  export WMTP_KILLS_UNTIL
  exec pytest -q -n logical --maxprocesses 4 --dist load --color=no tests/kills/test_campaign.py
}

_main "$@"

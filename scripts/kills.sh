#!/usr/bin/env bash
# Strikes the real worker so many times, at random lines of its code, on every provider; says what came of it:
#
#   scripts/kills.sh 1000 [SEED]
set -euo pipefail
# shellcheck source=entrypoint/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../entrypoint/lib.sh"

_main() {
  local kills=${1:-1000} seed=${2:-1}
  if ! [[ $kills =~ ^[1-9][0-9]*$ ]]; then
    say "usage: scripts/kills.sh KILLS [SEED]"
    exit 2
  fi
  cd "$WMTP_ROOT"
  ensure_venv dev
  export PATH=$venv/bin:$PATH WMTP_KILLS=$kills WMTP_KILLS_SEED=$seed
  exec pytest -q -n logical --maxprocesses 4 --dist load tests/kills/test_campaign.py
}

_main "$@"

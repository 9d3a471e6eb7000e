#!/usr/bin/env bash
# Makes requirements/*.txt from requirements/*.in: exact versions and hashes for Python 3.11+ on Linux and macOS.
#
#   scripts/lock.sh              keep the locked versions where the .in files still allow them
#   scripts/lock.sh --upgrade    take the newest that fit; further arguments go to `uv pip compile`
#
# Where packages come from is pip's own configuration; no address is written into a lock. Nor is torch, whoever asks for
# it: elsewhere.txt takes it and its CUDA packages out.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../requirements"

# uv does not read pip's configuration, so it is handed over
pip_setting() { python3 -m pip config get "global.$1" 2>/dev/null || true; }

export UV_FIND_LINKS=${UV_FIND_LINKS:-$(pip_setting find-links)}
UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$(pip_setting index-url)}
if [[ -n $UV_DEFAULT_INDEX ]]; then export UV_DEFAULT_INDEX; else unset UV_DEFAULT_INDEX; fi

uv=$(command -v uv || true)
if [[ -z $uv ]]; then
  tools=$(mktemp -d)
  trap 'rm -rf "$tools"' EXIT
  python3 -m venv "$tools"
  "$tools/bin/pip" --quiet --disable-pip-version-check install uv
  uv=$tools/bin/uv
fi

# tests/requirements compares the digest in the first line with the .in files: a forgotten lock is noticed offline
lock() {
  local name=$1 digest
  shift
  digest=$(cat "$@" | sha256sum | cut -d ' ' -f 1)
  "$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
    --no-emit-index-url --no-emit-find-links --override elsewhere.txt --no-emit-package torch "${arguments[@]}" "$name.in" --output-file "$name.txt"
  {
    echo "# made by scripts/lock.sh from $* (sha256 $digest)"
    grep -v '^# made by scripts/lock.sh' "$name.txt"
  } >"$name.txt.new"
  mv "$name.txt.new" "$name.txt"
  echo "requirements/$name.txt: $(grep -c '==' "$name.txt") packages"
}

arguments=("$@")
lock runtime runtime.in
lock dev runtime.in dev.in
arguments+=(--no-deps)
lock mlflow-server mlflow-server.in

# shellcheck shell=bash
# What start.sh, entrypoint.sh and scripts/test.sh share. Source it; it only defines functions.

# the root of the checkout, or of what the image holds
WMTP_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
OLDEST_PYTHON=3.11

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# settings, credentials or input are wrong: what, then what to do about it, one line each
fail() {
  say "error: $1"
  shift
  (($# == 0)) || printf '  -> %s\n' "$@" >&2
  exit 78
}

# --- signals during the set-up ---------------------------------------------------------------------------

child=

# Runs a command that a signal may end at any moment: bash itself answers signals only while it waits.
interruptible() {
  local status=0
  set -m # a process group of its own, so that its children end with it
  "$@" </dev/null &
  child=$!
  set +m
  wait "$child" || status=$?
  child=
  return "$status"
}

interrupted() {
  trap '' HUP INT TERM
  if [[ -n $child ]]; then
    kill -TERM -- "-$child" 2>/dev/null || true
    wait "$child" 2>/dev/null || true
  fi
  say "interrupted during the set-up; nothing is lost, start it again"
  exit 75
}

# --- Python ----------------------------------------------------------------------------------------------

# Prints the command line that installs Debian packages here, or the one a person would have to run (and fails).
apt_command() {
  local command=(apt-get install -y --no-install-recommends "$@")
  if ! command -v apt-get >/dev/null; then
    echo "install Python $OLDEST_PYTHON or newer with its venv module, then start this again"
    return 1
  elif [[ $(id -u) == 0 ]]; then
    echo "${command[*]}"
  elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    echo "sudo -n ${command[*]}"
  else
    echo "sudo apt-get update && sudo ${command[*]}"
    return 1
  fi
}

# Installs Debian packages, or ends with what is missing ($1) and the command that would help.
apt_install() {
  local missing=$1 command log
  shift
  command=$(apt_command "$@") || fail "$missing" "$command"
  say "$missing; installing $*"
  log=$(mktemp)
  # in the foreground on purpose: half-configured packages are worse than a signal answered a little later
  # shellcheck disable=SC2086 # the command is words without spaces in them
  if ! { ${command%% install *} update && DEBIAN_FRONTEND=noninteractive $command; } >"$log" 2>&1 </dev/null; then
    tail -n 10 "$log" >&2
    rm -f "$log"
    fail "$missing, and it could not be installed" "$command"
  fi
  rm -f "$log"
}

new_enough() {
  "$1" -c "import sys; sys.exit(sys.version_info[:2] < (${OLDEST_PYTHON/./,}))" >/dev/null 2>&1
}

# Prints the first Python that is new enough.
find_python() {
  local name
  for name in python3 python3.14 python3.13 python3.12 python3.11; do
    if new_enough "$name"; then
      echo "$name"
      return
    fi
  done
  return 1
}

# Sets $python to one that is new enough and can make environments, installing what is missing where that is allowed.
ensure_python() {
  if ! python=$(find_python); then
    if command -v python3 >/dev/null; then
      apt_install "$(python3 --version 2>&1) is too old, $OLDEST_PYTHON or newer is needed" \
        "python$OLDEST_PYTHON" "python$OLDEST_PYTHON-venv"
    else
      apt_install "there is no python3" python3 python3-venv
    fi
    python=$(find_python) || fail "there is still no Python $OLDEST_PYTHON or newer" "put one on PATH"
  fi
  if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
    local version
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    apt_install "Python's venv module is missing" "python$version-venv"
  fi
}

# --- the environment -------------------------------------------------------------------------------------

# Sets $venv, an absolute path: $WMTP_VENV, or .venv at the root.
locate_venv() {
  venv=${WMTP_VENV:-$WMTP_ROOT/.venv}
  [[ $venv == /* ]] || venv=$PWD/$venv
}

# Prints what an environment of the kind "runtime" or "dev" is made from: another sum, another environment.
fingerprint() {
  local requirements=$WMTP_ROOT/requirements
  { echo "$WMTP_ROOT" && cat "$requirements/$1.txt" "$requirements/torch.txt" "$WMTP_ROOT/pyproject.toml"; } | cksum
}

is_ready() {
  local stamp=$venv/.wmtp-$1
  [[ -x $venv/bin/python && -r $stamp && $(<"$stamp") == "$(fingerprint "$1")" ]]
}

# Makes the environment $venv ready for "runtime" or "dev". The stamp is written last, so what was interrupted is not
# taken for ready; what was interrupted while it was first made is made anew.
ensure_venv() {
  local kind=$1
  locate_venv
  if is_ready "$kind"; then return; fi

  trap interrupted HUP INT TERM
  mkdir -p "$venv" 2>/dev/null && [[ -w $venv ]] || fail "$venv cannot be written" "set WMTP_VENV to a folder that can"
  lock_venv
  is_ready "$kind" || make_venv "$kind"
  exec 9<&-
  trap - HUP INT TERM
}

# Two set-ups at once would tear the environment. The lock ends with the process that holds it.
lock_venv() {
  exec 9<"$venv"
  command -v flock >/dev/null || return 0
  if ! flock --nonblock 9; then
    say "another set-up is using $venv, waiting for it"
    interruptible flock 9
  fi
}

make_venv() {
  local kind=$1 unfinished=$venv/.wmtp-unfinished started=$SECONDS
  if [[ -e $unfinished || -e $venv/pyvenv.cfg && ! -x $venv/bin/python ]]; then
    say "$venv is half-made or its Python is gone, making it anew"
    touch "$unfinished"
    find "$venv" -mindepth 1 -maxdepth 1 ! -path "$unfinished" -exec rm -rf {} +
  elif [[ -n $(ls -A "$venv") && ! -e $venv/pyvenv.cfg ]]; then
    fail "$venv is neither empty nor a Python environment" "set WMTP_VENV to another folder"
  fi
  if [[ ! -x $venv/bin/python ]]; then
    ensure_python
    say "making a Python environment in $venv (once)"
    touch "$unfinished"
    interruptible "$python" -m venv "$venv" || fail "$python -m venv failed" "the lines above say why"
  fi
  say "installing requirements/$kind.txt"
  # the lock is complete but for torch, which some of it asks for
  pip_install --no-deps --require-hashes -r "$WMTP_ROOT/requirements/$kind.txt"
  say "installing torch (200 MB to 3 GB)"
  pip_install -r "$WMTP_ROOT/requirements/torch.txt"
  pip_install --no-deps --no-build-isolation --editable "$WMTP_ROOT"
  fingerprint runtime >"$venv/.wmtp-runtime" # dev holds runtime
  fingerprint "$kind" >"$venv/.wmtp-$kind"
  rm -f "$unfinished"
  unset PYTHONDONTWRITEBYTECODE # or every start would compile again
  say "ready after $((SECONDS - started)) s"
}

pip_install() {
  local log=$venv/set-up.log
  # --no-compile: the first start compiles what it uses, a tenth of what there is
  if ! interruptible "$venv/bin/python" -m pip --no-input --disable-pip-version-check install --no-compile "$@" \
    >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    fail "pip could not install what is needed; all it said is in $log" \
      "check the network, pip's configuration and the space left in $venv, then start this again"
  fi
}

# --- in the image ----------------------------------------------------------------------------------------

writable_folder() { mkdir -p "$1" 2>/dev/null && [[ -w $1 ]]; }

# Any user, a read-only root, no home: caches and temporary files go where something can be written, the volume first
# so that a restarted container finds what was compiled before.
find_room_for_caches() {
  local folder room=
  for folder in "${WMTP_WORKDIR:-/workspace}" "${HOME:-/}" /tmp; do
    if [[ $folder != / ]] && writable_folder "$folder/.cache"; then
      room=$folder/.cache
      break
    fi
  done
  # nothing can be written: wmtp says so, better than this could
  [[ -n $room ]] || return 0
  export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$room}
  export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$room/triton}
  export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$room/inductor}
  if [[ ${HOME:-/} == / || ! -w $HOME ]]; then export HOME=$room; fi
  if [[ ! -w ${TMPDIR:-/tmp} ]] && writable_folder "$room/tmp"; then export TMPDIR=$room/tmp; fi
  # torch asks for the user's name, which an arbitrary uid does not have
  if ! id -un >/dev/null 2>&1; then export USER=${USER:-wmtp} LOGNAME=${LOGNAME:-wmtp}; fi
}

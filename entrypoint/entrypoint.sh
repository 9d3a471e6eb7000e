#!/usr/bin/env bash
# The image's entrypoint: makes the surroundings fit, then becomes the command. See `help`.
set -euo pipefail
# shellcheck source=entrypoint/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# wmtp_worker/settings/secrets.py has the same list; a test holds the two equal
SECRET_VARIABLES=(
  AWS_ACCESS_KEY_ID
  AWS_SECRET_ACCESS_KEY
  AWS_SESSION_TOKEN
  AZURE_STORAGE_CONNECTION_STRING
  AZURE_STORAGE_KEY
  AZURE_STORAGE_SAS_TOKEN
  AZURE_CLIENT_SECRET
  GOOGLE_APPLICATION_CREDENTIALS_JSON
  HF_TOKEN
  MLFLOW_TRACKING_USERNAME
  MLFLOW_TRACKING_PASSWORD
  MLFLOW_TRACKING_TOKEN
)

# the commands of wmtp itself, but for `train`; a test holds them equal to those it has
COMMANDS=(plan evaluate report checkpoints assets models data sync tracking launch doctor host settings)

usage() {
  cat <<'TEXT'
docker run [...] -v NAME:/workspace IMAGE [command]

  train [options]        train, or go on with a run (the default): train --preset smoke --resume auto
  plan [options]         what a run will need and cost
  evaluate RUN           evaluate a run's checkpoint
  report RUN...          a page about a run, or several compared
  checkpoints ls|verify  what is in a run, and whether it is whole
  assets ls|pull|push    models and data sets by name, from the bucket or the hub
  models show|convert    what a model is, another layout of it
  data show|label        what a data set is; which solutions are right, by running them
  sync push|pull|ls      copy what differs between a folder and a bucket
  tracking check|push    does the MLflow server answer? send it a run afterwards
  launch                 start a job on a machine, by ssh or a host's own API
  host stop --dry-run    how this rented machine would be stopped
  doctor                 is this machine fit? what to do if not
  settings show          the settings a run would have, and where each comes from
  health                 is the training alive? (what HEALTHCHECK asks)
  shell                  bash in the image

Anything else is run as it is if it is a program of the image. `train --help` and the like say more.
Secrets may come from files: AWS_SECRET_ACCESS_KEY_FILE=/run/secrets/key, and so on.
TEXT
}

# Puts the content of the file $NAME_FILE into NAME, as wmtp itself does: here for what is not wmtp.
file_env() {
  local name=$1 file=$1_FILE value
  [[ -n ${!file:-} ]] || return 0
  # one newline at the end is dropped, as wmtp does; a bare $(...) would drop them all
  value=$(cat "${!file}" 2>/dev/null && printf .) ||
    fail "$file=${!file} cannot be read" "make the file readable, or set $name itself"
  value=${value%.} value=${value%$'\n'} value=${value%$'\r'}
  [[ -n $value ]] || fail "$file=${!file} is an empty file" "put the secret in it"
  if [[ -n ${!name:-} && ${!name} != "$value" ]]; then
    fail "both $name and $file are set, to different values" "keep only one of them"
  fi
  export "$name=$value"
}

# The version of the torch that would be imported, from its metadata: importing it takes seconds.
torch_version() {
  python3 -c 'import importlib.metadata as metadata; print(metadata.version("torch"))' 2>/dev/null
}

check_torch() {
  local version
  version=$(torch_version) || fail "this image has no torch" "build it on a base image that has torch 2"
  [[ $version == 2.* ]] || fail "this image has torch $version, and wmtp-worker needs torch 2" \
    "build it on a base image with torch 2: docker build --build-arg BASE_IMAGE=..."
}

_main() {
  # options alone are options of train
  if (($# == 0)) || [[ $1 == -* && $1 != -h && $1 != --help && $1 != --version ]]; then set -- train "$@"; fi
  find_room_for_caches
  local name
  for name in "${SECRET_VARIABLES[@]}"; do file_env "$name"; done

  case $1 in
  train)
    check_torch
    # the container's exit code tells the host whether to start it again
    if [[ ${WMTP_RESTART:-auto} == auto ]]; then export WMTP_RESTART=never; fi
    exec "$WMTP_ROOT/entrypoint/start.sh" "${@:2}"
    ;;
  evaluate)
    check_torch
    exec wmtp "$@"
    ;;
  --version) exec wmtp "$@" ;;
  health) exec "$WMTP_ROOT/entrypoint/health.sh" ;;
  shell) exec bash "${@:2}" ;;
  help | -h | --help) usage ;;
  *)
    if [[ " ${COMMANDS[*]} " == *" $1 "* ]]; then exec wmtp "$@"; fi
    command -v -- "$1" >/dev/null || fail "unknown command: $1" \
      "one of train, $(printf '%s, ' "${COMMANDS[@]}")health, shell, help, or a program of the image"
    exec "$@"
    ;;
  esac
}

_is_sourced() { [[ ${BASH_SOURCE[0]} != "$0" ]]; }

_is_sourced || _main "$@"

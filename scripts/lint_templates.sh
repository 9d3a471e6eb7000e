#!/usr/bin/env bash
# Checks the hosts' templates by tools too large for the test command (200 MB), by hand after a change: Kubernetes' own
# schemas, cloud-init's, which Debian's package has, and Docker Compose itself, installed or from Debian or Ubuntu.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
python3 -m venv "$tools/venv"
"$tools/venv/bin/pip" --quiet --disable-pip-version-check install kubernetes-validate check-jsonschema

# the oldest that the Job is for, and the newest that the package knows
"$tools/venv/bin/kubernetes-validate" --kubernetes-version 1.31 --strict docker/kubernetes/job.yaml
"$tools/venv/bin/kubernetes-validate" --strict docker/kubernetes/job.yaml

if command -v apt-get >/dev/null; then
  (cd "$tools" && apt-get download --quiet cloud-init 2>/dev/null && dpkg -x cloud-init_*.deb cloud-init)
  schema=$(find "$tools/cloud-init" -name 'schema-cloud-config-v1.json')
  "$tools/venv/bin/check-jsonschema" --schemafile "$schema" docker/ec2/cloud-init.yaml
else
  echo "no apt-get: cloud-init's schema is not looked at" >&2
fi

compose=(docker compose)
if ! "${compose[@]}" version >/dev/null 2>&1; then
  # Ubuntu's name, and Debian's since 13; what Debian 12 has of that name is too old
  for package in docker-compose-v2 docker-compose; do
    (cd "$tools" && apt-get download --quiet "$package" >/dev/null 2>&1 && dpkg -x "$package"_*.deb compose) || continue
    compose=("$(find "$tools/compose" -path '*cli-plugins/docker-compose')")
    [[ -z ${compose[0]} ]] || break
  done
fi
if [[ -n ${compose[0]} ]] && "${compose[@]}" version >/dev/null 2>&1; then
  # a copy: docker/.env is of this machine
  cp -r docker "$tools/docker"
  rm -rf "$tools"/docker/.env "$tools"/docker/tracking/{htpasswd,s3.json}
  "$tools/docker/tracking/passwords.sh" >/dev/null
  for file in compose.yaml compose.tracking.yaml; do
    # what it warns about, as of variables that nobody set, is an error
    if ! found=$("${compose[@]}" --file "$tools/docker/$file" --profile '*' config --quiet 2>&1) || [[ $found ]]; then
      echo "docker/$file: $found" >&2
      exit 1
    fi
  done
else
  echo "no Docker Compose 2: the compose files are not looked at" >&2
fi

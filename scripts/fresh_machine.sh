#!/usr/bin/env bash
# Tries the two commands where nothing is installed: in a container of a plain Debian or Ubuntu, from a fresh clone.
# By hand, before a release; it needs Docker and a network, and takes some minutes.
#
#   scripts/fresh_machine.sh [IMAGE]     debian:12 by default
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

image=${1:-debian:12}
name=wmtp-fresh-machine-$$
trap 'docker rm --force "$name" >/dev/null' EXIT

options=(--name "$name")
# a folder of wheels that pip is configured to use here is of use there too
links=$(python3 -m pip config get global.find-links 2>/dev/null || true)
if [[ -d $links ]]; then options+=(--volume "$links:$links:ro" --env "PIP_FIND_LINKS=$links"); fi

docker run --detach "${options[@]}" "$image" sleep infinity >/dev/null
git archive --prefix=wmtp-worker/ HEAD | docker exec --interactive "$name" tar --extract --directory /root

on_it() {
  echo "== $*"
  docker exec --workdir /tmp "$name" bash -c "TIMEFORMAT='== %0R s'; time $*"
}

# an image may have more than a fresh machine does
on_it "apt-get purge --quiet --quiet --yes python3-venv 'python3.*-venv' >/dev/null 2>&1 || true"
on_it "bash /root/wmtp-worker/entrypoint/start.sh --preset smoke"
on_it "bash /root/wmtp-worker/entrypoint/start.sh --preset smoke --resume"
on_it "bash /root/wmtp-worker/scripts/test.sh"

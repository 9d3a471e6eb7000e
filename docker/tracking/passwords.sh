#!/usr/bin/env bash
# Makes the passwords of docker/compose.tracking.yaml, once; what is there stays. Prints how workers log in.
#
#   docker/tracking/passwords.sh [USER]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
umask 077

value() { sed -n "s/^$1=//p" ../.env | tail -n 1; }
# docker/.env may be there for other variables, and a line that is set to nothing is set
want() { grep -q "^$1=" ../.env || echo "$1=$2" >>../.env; }
made() { openssl rand -hex 24; }

touch ../.env
# whoever wrote it may have left the last line open
[[ -z $(tail -c 1 ../.env) ]] || echo >>../.env
chmod 600 ../.env
want COMPOSE_PROFILES store
want POSTGRES_PASSWORD "$(made)"
want TRACKING_S3_SECRET "$(made)"
want MLFLOW_TRACKING_USERNAME "${1:-wmtp}"
want MLFLOW_TRACKING_PASSWORD "$(made)"

[[ -e s3.json ]] || printf '{"identities": [{"name": "mlflow", "credentials": [{"accessKey": "mlflow", "secretKey": "%s"}], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}]}\n' \
  "$(value TRACKING_S3_SECRET)" >s3.json
[[ -e htpasswd ]] || printf '%s:%s\n' "$(value MLFLOW_TRACKING_USERNAME)" \
  "$(openssl passwd -6 -stdin <<<"$(value MLFLOW_TRACKING_PASSWORD)")" >htpasswd
# nginx and the store read them as users of their own
chmod 755 .
chmod 644 htpasswd s3.json

echo "export MLFLOW_TRACKING_URI=http://127.0.0.1:5000"
grep '^MLFLOW_TRACKING_' ../.env | sed 's/^/export /'

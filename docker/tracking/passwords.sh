#!/usr/bin/env bash
# Makes the passwords of docker/compose.tracking.yaml, once; what is there stays. Prints how workers log in.
#
#   docker/tracking/passwords.sh [USER]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
umask 077

user=${1:-wmtp}
made() { openssl rand -hex 24; }

if [[ ! -e ../.env ]]; then
  password=$(made) secret=$(made)
  cat >../.env <<TEXT
COMPOSE_PROFILES=store
POSTGRES_PASSWORD=$(made)
TRACKING_S3_SECRET=$secret
MLFLOW_TRACKING_USERNAME=$user
MLFLOW_TRACKING_PASSWORD=$password
TEXT
  printf '{"identities": [{"name": "mlflow", "credentials": [{"accessKey": "mlflow", "secretKey": "%s"}], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}]}\n' \
    "$secret" >s3.json
  printf '%s:%s\n' "$user" "$(openssl passwd -6 -stdin <<<"$password")" >htpasswd
  # nginx and the store read them as users of their own
  chmod 644 htpasswd s3.json
fi
echo "export MLFLOW_TRACKING_URI=http://127.0.0.1:5000"
grep '^MLFLOW_TRACKING_' ../.env | sed 's/^/export /'

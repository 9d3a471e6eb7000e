#!/bin/bash
# Pulls the image $1; from ECR by the instance's role. A registry that is away for a moment ends no first boot.
for pause in 10 30 0; do
  if [[ $1 =~ ^([0-9]+\.dkr\.ecr\.([a-z0-9-]+)\.amazonaws\.com(\.cn)?)/ ]]; then
    aws ecr get-login-password --region "${BASH_REMATCH[2]}" |
      docker login --username AWS --password-stdin "${BASH_REMATCH[1]}"
  fi
  docker pull --quiet "$1" && exit
  sleep "$pause"
done
exit 1 # an image that is there already is started all the same

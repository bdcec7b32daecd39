#!/usr/bin/env bash
# Builds the container image with whichever builder this machine has.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tag=${IMAGE:-kvindex-server:dev}

for builder in docker podman buildah; do
  command -v "$builder" > /dev/null || continue
  # A docker client without its daemon builds nothing.
  "$builder" info > /dev/null 2>&1 || continue
  if [ "$builder" = buildah ]; then
    exec buildah build --tag "$tag" .
  fi
  exec "$builder" build --tag "$tag" .
done
echo "make image needs a working docker, podman or buildah; none was found here." >&2
exit 1

#!/usr/bin/env bash
# Copies the image's bill of materials (CycloneDX) to dist/sbom.cdx.json.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
image=${IMAGE:-kvindex-server:dev}
# Whichever has it: docker and podman keep their images apart, podman and buildah together.
engine=""
for candidate in docker podman; do
  if "$candidate" image inspect "$image" > /dev/null 2>&1; then
    engine=$candidate
    break
  fi
done
[ -n "$engine" ] || { echo "neither docker nor podman has an image $image: make image" >&2; exit 1; }
mkdir -p dist
# Created, never started.
container=$("$engine" create "$image")
trap '"$engine" rm "$container" > /dev/null' EXIT
"$engine" cp "$container:/opt/kvindex/sbom.cdx.json" dist/sbom.cdx.json
echo "dist/sbom.cdx.json: $(grep -c '"purl"' dist/sbom.cdx.json) components"

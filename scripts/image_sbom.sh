#!/usr/bin/env bash
# Copies the image's bill of materials (CycloneDX) to dist/sbom.cdx.json.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
image=${IMAGE:-kvindex-server:dev}
engine=$(command -v podman || command -v docker) || { echo "make sbom needs podman or docker" >&2; exit 1; }
mkdir -p dist
# Created, never started.
container=$("$engine" create "$image")
trap '"$engine" rm "$container" > /dev/null' EXIT
"$engine" cp "$container:/opt/kvindex/sbom.cdx.json" dist/sbom.cdx.json
echo "dist/sbom.cdx.json: $(grep -c '"purl"' dist/sbom.cdx.json) components"

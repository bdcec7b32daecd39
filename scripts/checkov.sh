#!/usr/bin/env bash
# Runs checkov over the Dockerfile and over what the chart renders to; installs it into build/ once, because its many
# dependencies are pinned in ways that do not go with ours.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
version=3.3.30
venv=build/checkov-venv
if [ ! -e "$venv/.installed-$version" ]; then
  "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/pip" install -q "checkov==$version"
  touch "$venv/.installed-$version"
fi
manifests=()
for profile in tests/golden/chart/*.yaml; do
  [[ $profile == *.values.yaml ]] || manifests+=(--file "$profile")
done
"$venv/bin/checkov" --config-file .checkov.yaml --framework kubernetes "${manifests[@]}"
"$venv/bin/checkov" --config-file .checkov.yaml --framework dockerfile --file Dockerfile
echo "checkov $version: nothing found in $((${#manifests[@]} / 2)) rendered profiles and the Dockerfile"

#!/usr/bin/env bash
# Builds the wheel twice, from copies of the tracked files at different places, and compares the bytes.
# PYTHON names the interpreter; without it that of .venv. The wheel stays in dist/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$PWD/.venv/bin/python}
# Dates inside archives are that of the last commit.
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH

mkdir -p build dist
work=$(mktemp -d "$PWD/build/reproducible.XXXXXX")
trap 'rm -rf "$work"' EXIT
for place in first second/deeper; do
  mkdir -p "$work/$place/source"
  git ls-files -z | xargs -0 cp --parents -t "$work/$place/source"
  (cd "$work/$place/source" && "$python" -m pip wheel -q --no-deps --wheel-dir "$work/$place/out" .)
done
first=("$work"/first/out/*.whl)
second=("$work"/second/deeper/out/*.whl)
sha256sum "${first[@]}" "${second[@]}" | sed "s,$work/,,"
cmp "${first[0]}" "${second[0]}" && echo "equal, byte for byte"
cp "${first[@]}" dist/

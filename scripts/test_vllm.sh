#!/usr/bin/env bash
# Runs tests/vllm against a real vLLM on its CPU backend, in a virtual environment of its own.
# Usage: scripts/test_vllm.sh PYTHON, with the project's own Python. Says why when it cannot be run here.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$1
venv=build/vllm-venv
requirements=tests/vllm/requirements.txt
installed=$venv/installed.txt

skip() {
  echo "test-vllm: skipped: $1" >&2
  exit 0
}

[ "$(uname -sm)" = "Linux x86_64" ] || skip "the pinned packages are for Linux on x86_64"
grep -qw avx2 /proc/cpuinfo || skip "the processor has no AVX2"
awk '/MemAvailable/ { exit $2 < 4000000 }' /proc/meminfo || skip "less than 4 GB of memory are free"

if ! cmp -s "$requirements" "$installed"; then
  rm -rf "$venv"
  mkdir -p build
  [ "$(df -Pk build | awk 'NR == 2 { print $4 }')" -ge 10000000 ] || skip "less than 10 GB are free for the packages"
  echo "test-vllm: installing vLLM into $venv (about 3 GB to download, 6.2 GB on disk)" >&2
  "$python" -m venv "$venv"
  "$venv/bin/pip" install -q --no-deps -r "$requirements" || skip "its packages cannot be installed here, see above"
  cp "$requirements" "$installed"
fi

VLLM_PYTHON=$PWD/$venv/bin/python exec "$python" -m pytest --timeout 600 -v --durations 0 tests/vllm/real_engines.py

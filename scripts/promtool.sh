#!/usr/bin/env bash
# Prints the path of promtool: the installed one, else the one in Debian's package, unpacked once into build/.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=$root/build/prometheus
if command -v promtool; then
  exit 0
fi
if [ ! -x "$cache/usr/bin/promtool" ]; then
  mkdir -p "$root/build"
  work=$(mktemp -d "$root/build/prometheus.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  (cd "$work" && apt-get download -q prometheus > /dev/null)
  dpkg -x "$work"/prometheus_*.deb "$work/unpacked"
  # Two runs at once: the first one in stays.
  mv -T "$work/unpacked" "$cache" 2> /dev/null || [ -x "$cache/usr/bin/promtool" ]
fi
echo "$cache/usr/bin/promtool"

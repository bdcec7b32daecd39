#!/usr/bin/env bash
# Makes a stand-in for the Dockerfile's base image where no registry of images can be reached: Debian with its own Python,
# by debootstrap, committed under the base's name. Root, debootstrap and buildah are needed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
base=docker.io/library/$(sed -n 's/^ARG BASE=//p' Dockerfile)
suite=${SUITE:-bookworm}
mirror=${MIRROR:-http://deb.debian.org/debian}

if buildah inspect --type image "$base" > /dev/null 2>&1; then
  exit 0
fi
mkdir -p build
work=$(mktemp -d "$PWD/build/image-base.XXXXXX")
trap 'rm -rf "$work"' EXIT
debootstrap --variant=minbase \
  --include=ca-certificates,python3,python3-pip,python3-dev,python-is-python3 "$suite" "$work/root" "$mirror" > "$work/log" 2>&1 \
  || { tail -n 20 "$work/log" >&2; exit 1; }
rm -rf "$work"/root/var/cache/apt/archives/*.deb "$work"/root/var/lib/apt/lists/* \
  "$work"/root/usr/share/doc "$work"/root/usr/share/man
# Where the way out leads through a gateway with its own authority, the build needs what this machine trusts.
install -m 644 /etc/ssl/certs/ca-certificates.crt "$work/root/etc/ssl/certs/ca-certificates.crt"

container=$(buildah from scratch)
buildah copy --quiet "$container" "$work/root" / > /dev/null
buildah config --cmd python3 "$container"
buildah commit --quiet --rm "$container" "$base" > /dev/null
echo "$base is now Debian $suite with $("$work/root/usr/bin/python3" --version 2> /dev/null || echo "its own Python")"

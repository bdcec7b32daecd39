#!/usr/bin/env bash
# Runs clang-tidy on the native core with the compile commands of its test build, which needs no binding.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=$PWD/.venv/bin
build=build/tidy
"$bin/cmake" -S native -B "$build" -G Ninja -DCMAKE_MAKE_PROGRAM="$bin/ninja" -DCMAKE_BUILD_TYPE=Debug \
  -DCMAKE_EXPORT_COMPILE_COMMANDS=ON -DKVINDEX_NATIVE_TESTS=ON > /dev/null
find native/src -name '*.cpp' ! -name 'module*.cpp' -print0 \
  | xargs -0 -n 1 -P 2 "$bin/clang-tidy" -p "$build" --quiet

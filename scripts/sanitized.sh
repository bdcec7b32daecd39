#!/usr/bin/env bash
# Runs the multi-threaded Python tests over a core built with a sanitizer: `address` or `thread`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
sanitizer=$1
python=$PWD/.venv/bin/python
build=$PWD/build/sanitized/$sanitizer

"$PWD/.venv/bin/cmake" -S native -B "$build" -G Ninja -DCMAKE_MAKE_PROGRAM="$PWD/.venv/bin/ninja" \
  -DCMAKE_BUILD_TYPE=RelWithDebInfo -DKVINDEX_SANITIZE="$sanitizer" -DPython_EXECUTABLE="$python" > /dev/null
"$PWD/.venv/bin/cmake" --build "$build" --target _core
case $sanitizer in
  address) library=libasan.so ;;
  thread) library=libtsan.so ;;
esac
# Python frees its own memory at exit or never: only our errors are looked for, not its leaks.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1
export TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1:ignore_noninstrumented_modules=1
# What throws is looked up when the sanitizer starts, and Python itself brings no libstdc++.
runtime=$(${CXX:-c++} -print-file-name="$library"):$(${CXX:-c++} -print-file-name=libstdc++.so.6)
# pytest holds what a test writes to stderr and a sanitizer ends the process at once: reports go to files.
reports=$build/report
rm -f "$reports".*
ASAN_OPTIONS+=:log_path=$reports TSAN_OPTIONS+=:log_path=$reports
trap 'cat "$reports".* >&2 2> /dev/null || true' EXIT
LD_PRELOAD=$runtime CORE=$(echo "$build"/_core*.so) PYTHONPATH=tests \
  "$python" -m pytest -q -p other_core -p no:cacheprovider --timeout 600 \
  tests/test_concurrency.py tests/test_order.py tests/test_snapshot_core.py tests/test_subscription.py tests/test_listening.py

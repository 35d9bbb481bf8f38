#!/usr/bin/env bash
# Installs what is missing, builds, and runs every test. Usage: tests/run.sh [cpu|cuda|asan|ubsan]
# Real data and reference cases are found through LONGHAND_DATA and LONGHAND_GOLDEN; without them their tests say "skipped".
# The last line counts: "N passed, N failed, N skipped". The exit code is 0 only when nothing failed.
set -euo pipefail
cd "$(dirname "$0")/.."
preset=${1:-cpu}
jobs=$(nproc)

tools/install_dependencies.sh
cmake --preset "$preset" >/dev/null
cmake --build --preset "$preset" -- -j "$jobs"

results=$PWD/build/$preset/test-results.xml
rm -f "$results"
status=0
# One thread per test program: the tests themselves run side by side.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-1} \
  ctest --preset "$preset" -j "$jobs" --output-junit "$results" --quiet || status=$?

count() { grep -oE "$1=\"[0-9]+\"" "$results" | head -n 1 | grep -oE '[0-9]+' || echo 0; }
total=$(count tests); failed=$(count failures); skipped=$(( $(count skipped) + $(count disabled) ))
if [ "$failed" -gt 0 ] || [ "$status" -ne 0 ]; then
  ctest --preset "$preset" --rerun-failed --output-on-failure || true
fi
grep -oE 'skipped: [^<]*' "$results" | sort | uniq -c | sort -rn || true
echo "$((total - failed - skipped)) passed, $failed failed, $skipped skipped"
[ "$total" -gt 0 ] || { echo "error: no test ran" >&2; exit 1; }
[ "$failed" -eq 0 ] && [ "$status" -eq 0 ]

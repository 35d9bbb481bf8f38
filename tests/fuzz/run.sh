#!/usr/bin/env bash
# Coverage-guided fuzzing of every reader of files that others wrote. Usage: tests/fuzz/run.sh [SECONDS PER READER, 2] [READER...]
# Needs clang with its libFuzzer (Debian: clang and libclang-rt-dev). The corpus begins with files made by longhand's own writers and grows under build/fuzz/corpus.
# An input that breaks a reader is left in build/fuzz/findings; it becomes a test before the reader is mended.
set -euo pipefail
cd "$(dirname "$0")/../.."
seconds=${1:-2}
shift || true

command -v clang++ >/dev/null || { echo "error: no clang++; on Debian and Ubuntu: apt-get install clang libclang-rt-dev" >&2; exit 1; }
echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' |
  clang++ -x c++ -fsanitize=fuzzer,address,undefined -o /dev/null - 2>/dev/null ||
  { echo "error: clang++ is there, but not the runtime of its sanitizers and libFuzzer; on Debian and Ubuntu: apt-get install libclang-rt-dev" >&2; exit 1; }

cmake --preset fuzz >/dev/null
cmake --build --preset fuzz -- -j "$(nproc)"
build=$PWD/build/fuzz
"$build/longhand_fuzz" --write-corpus="$build/corpus"
mkdir -p "$build/findings"
readers=("$@")
[ ${#readers[@]} -gt 0 ] || readers=($(ls "$build/corpus"))

total=0
failed=0
for reader in "${readers[@]}"; do
  log=$build/$reader.log
  status=0
  # A zstd window is limited to 1 MiB here; nothing else may ask for more memory than a file of 64 KiB can justify.
  "$build/longhand_fuzz" --reader="$reader" -max_total_time="$seconds" -max_len=65536 -timeout=10 -rss_limit_mb=1024 -malloc_limit_mb=64 \
    -artifact_prefix="$build/findings/$reader-" "$build/corpus/$reader" >"$log" 2>&1 || status=$?
  runs=$(grep -aoE '^Done [0-9]+' "$log" | grep -oE '[0-9]+' || echo 0)
  edges=$(grep -aoE 'cov: [0-9]+' "$log" | tail -n 1 | grep -oE '[0-9]+' || echo 0)
  total=$((total + runs))
  [ "$runs" -gt 0 ] || [ "$status" -ne 0 ] || status=1  # a fuzzer that read nothing found nothing
  if [ "$status" -ne 0 ]; then
    failed=$((failed + 1))
    echo "$reader: a finding"
    grep -aE 'ERROR|runtime error|what\(\)|Test unit written' "$log" || tail -n 20 "$log"
  else
    echo "$reader: $runs inputs, $edges edges"
  fi
done
echo "fuzzed $total inputs, $failed readers with a finding"
[ "$failed" -eq 0 ]

#!/usr/bin/env bash
# Several processes under ASan, UBSan and LSan: the cases of the cross test that start them, on the CPU. Needs MPI (Debian: libopenmpi-dev).
# Usage: tests/sanitizers/processes.sh [CASES, 'scale:*']
# What MPI itself leaves behind is not reported. It unloads its parts before LSan looks, which then cannot name them: so they stay.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=$PWD/build/asan-mpi

cmake --preset asan -B "$build" -DLONGHAND_MPI=ON >/dev/null
cmake --build "$build" --target cross_test -- -j "$(nproc)"
echo 'int dlclose(void* library) { return library == 0; }' | cc -x c -shared -fPIC -o "$build/stay_loaded.so" -
printf 'leak:%s\n' libmpi libopen- libpmix libhwloc libevent mca_ libopenblas vasprintf > "$build/left_by_mpi"

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} LD_PRELOAD=$build/stay_loaded.so
export ASAN_OPTIONS=verify_asan_link_order=0:quarantine_size_mb=8 LSAN_OPTIONS=suppressions=$build/left_by_mpi:print_suppressions=0
cd "$build"
exec ./cross_test -tc="${1:-scale:*}"

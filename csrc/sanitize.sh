#!/usr/bin/env bash
# Builds the native module under AddressSanitizer and UndefinedBehaviorSanitizer and runs its tests, then the thread
# pool under ThreadSanitizer. Needs g++ and an environment in which `pip install -e '.[test]'` was run.
#
#   csrc/sanitize.sh                   # everything, some minutes
#   csrc/sanitize.sh -k attention      # arguments go to pytest
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cxx=${CXX:-g++}

# In a copy, so that the module in use stays as it is.
cp -r "$root" "$scratch/repository"
cd "$scratch/repository"
rm -rf build llama_fast/_C.*.so
LLAMA_FAST_CXXFLAGS="-g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
    python setup.py build_ext --inplace
# Python itself is not built with the sanitizer: its runtime has to come first, and Python's own leaks do not count.
runtimes="$($cxx -print-file-name=libasan.so):$($cxx -print-file-name=libubsan.so):$($cxx -print-file-name=libstdc++.so)"
LD_PRELOAD=$runtimes ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$PWD \
    python -m pytest -p no:cacheprovider tests/ops/test_cpu_accuracy.py tests/ops/test_cpu_one_answer.py \
    tests/ops/test_cpu_int4.py "$@"

$cxx -std=c++20 -O1 -g -fsanitize=thread -pthread csrc/cpu/thread_pool.cpp csrc/cpu/thread_pool_test.cpp \
    -o "$scratch/thread_pool_test"
TSAN_OPTIONS=die_after_fork=0 "$scratch/thread_pool_test"  # the test forks on purpose

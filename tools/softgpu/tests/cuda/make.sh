#!/bin/sh
# Compiles the CUDA programs of the tests to the PTX that is committed beside them: make.sh NVCC
set -e
cd "$(dirname "$0")"
for name in programs faults; do
  "$1" -ptx -std=c++17 -O3 -lineinfo -arch=compute_90 "$name.cu" -o "$name.ptx"
  # No machine's paths in the repository.
  sed -i 's|\(\.file[^"]*"\)[^"]*/|\1|' "$name.ptx"
done

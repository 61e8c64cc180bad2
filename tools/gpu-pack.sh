#!/usr/bin/env bash
# Collects in a folder what tools/gpu-check.sh runs on a machine with a GPU that has neither cargo nor nvcc: the tests that
# use one, as programs, and the commit they are of.
#   tools/gpu-pack.sh FOLDER
set -euo pipefail
[ $# = 1 ] || { sed -n '2,4p' "$0"; exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."

names=$(grep -lE 'every_device|same_bits' tests/*.rs | sed 's,tests/\(.*\)\.rs,\1,')
cargo test --release --locked --no-run $(printf -- '--test %s ' $names) 2>&1 | tee "$folder/build.log"
sed -n 's,.*Executable tests/\(.*\)\.rs (\(.*\)),\1 \2,p' "$folder/build.log" | while read -r name program; do
    grep -q 'target sm_90a' "$program" || { echo "$program has no CUDA kernels: tools/get-nvcc.sh" >&2; exit 1; }
    strip -o "$folder/$name" "$program"
done
rm "$folder/build.log"
cp tools/gpu-check.sh "$folder/"
{ git rev-parse HEAD; git status --short --untracked-files=no; } >"$folder/commit"
du -sh "$folder"

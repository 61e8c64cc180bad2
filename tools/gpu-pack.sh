#!/usr/bin/env bash
# Packs everything that tools/gpu-check.sh and tools/gpu-report.sh need on a GPU machine without cargo and nvcc: the test
# programs that use a GPU, dflash-gen, dflash-bench, the held-out prompts, and the commit.
#   tools/gpu-pack.sh pack.tar.xz      unpacks to pack/
set -euo pipefail
[ $# = 1 ] || { sed -n '2,4p' "$0"; exit 2; }
archive=$(realpath "$1")
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
mkdir "$work/pack"

mapfile -t names < <(sed -n 's/^for test in \(.*\); do$/\1/p' tools/gpu-check.sh | tr ' ' '\n' | cut -d/ -f1 | sort -u)
cargo test --release --locked --no-run "${names[@]/#/--test=}" 2>&1 | tee "$work/build.log"
sed -n 's,.*Executable tests/\(.*\)/main\.rs (\(.*\)),\1 \2,p' "$work/build.log" >"$work/programs"
DFLASH_COMMIT=$(git describe --always --dirty --abbrev=12) cargo build --release --locked
for name in dflash-gen dflash-bench; do echo "$name target/release/$name" >>"$work/programs"; done
while read -r name program; do
    grep -q 'target sm_90a' "$program" || { echo "$program has no CUDA kernels: tools/get-nvcc.sh" >&2; exit 1; }
    strip -o "$work/pack/$name" "$program"
done <"$work/programs"
cp tools/gpu-check.sh tools/gpu-report.sh tests/data/prompts.jsonl "$work/pack/"
{ git rev-parse HEAD; git status --short --untracked-files=no; } >"$work/pack/commit"
# Every program contains the same kernels. A dictionary longer than one program stores them once.
tar -C "$work" -c pack | xz --lzma2=preset=1,dict=64MiB >"$archive"
ls -l "$archive"

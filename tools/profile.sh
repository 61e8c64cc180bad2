#!/usr/bin/env bash
# Profiles a round with NVIDIA's profilers and prints tables of its kernels. Needs a GPU, a built dflash-bench, and
# Nsight Systems (nsys), Nsight Compute (ncu) or both.
#   tools/profile.sh OUT [FLAGS]   of dflash-bench round, one batch and context: --model qwen3-8b --context 1024
# Writes into OUT:
#   eager.nsys-rep  5 rounds launch by launch, with the ranges round, inject, draft, layer k, verify, accept
#   graph.nsys-rep  AR steps and rounds as they run, one entry per replay: periods and the gaps between them
#   node.nsys-rep   the same, one entry per kernel of a replay; small kernels look slower than they are
#   ncu.ncu-rep     one round, kernel by kernel: DRAM bytes, time, throughput, source lines
#   *.csv           the reports of nsys and ncu
#   kernels.txt     tables of these reports, by tools/kernel-table.py
#   log             output of the profilers
# Environment variables: BENCH, the dflash-bench to run [target/release/dflash-bench]; KERNELS, a regular expression for
# the kernels that ncu profiles [all]; RECORD, a record of dflash-bench kernels, whose read ceiling is 100 % [none].
# Exit codes: 0 every installed profiler succeeded, 1 a profiler or the round failed, 2 there is nothing to run.
set -uo pipefail

fail() { echo "profile.sh: $*" >&2; exit 2; }
tools=$(cd "$(dirname "$0")" && pwd)
bench=${BENCH:-$tools/../target/release/dflash-bench}
[ $# -ge 1 ] && [ "${1#-}" = "$1" ] ||
    fail "expected a folder to write to: tools/profile.sh OUT [FLAGS of dflash-bench round]"
out=$1
shift
[ -x "$bench" ] || fail "no dflash-bench at $bench: build it with cargo build --release, or set BENCH"
[ -z "${RECORD:-}" ] || [ -r "$RECORD" ] || fail "RECORD is $RECORD, which cannot be read"
mkdir -p "$out" || fail "the folder $out cannot be created"
have() { command -v "$1" >/dev/null; }
have nsys || have ncu ||
    fail "neither nsys nor ncu is on PATH: Nsight Systems and Nsight Compute have them, often in /usr/local/cuda/bin"
log=$out/log bad=0
failed() { echo "profile.sh: failed (exit code $1); its output is at the end of $log" >&2; bad=1; return 1; }
# step COMMAND...: its output goes to the log.
step() {
    echo "profile.sh: $*" >&2
    "$@" >>"$log" 2>&1 || failed $?
}
# table TITLE CSV: appends a table to kernels.txt.
table() {
    echo "$1"
    python3 "$tools/kernel-table.py" "$2" ${RECORD:+--record "$RECORD"} || bad=1
    echo
} >>"$out/kernels.txt"
: >"$log"
: >"$out/kernels.txt"

if have nsys; then
    # traced NAME REPORTS NSYS'S FLAGS -- THE ROUND'S FLAGS
    traced() {
        local name=$1 reports=$2 flags=()
        shift 2
        while [ "$1" != -- ]; do flags+=("$1"); shift; done
        shift
        step nsys profile --trace=cuda,nvtx --sample=none --cpuctxsw=none "${flags[@]}" --force-overwrite=true \
            --output="$out/$name" "$bench" round --device cuda "$@" &&
            step nsys stats --report "$reports" --format csv --force-export=true --force-overwrite=true \
                --output "$out/$name" "$out/$name.nsys-rep"
    }
    traced eager cuda_gpu_kern_sum,cuda_gpu_trace,nvtx_pushpop_sum,nvtx_gpu_proj_sum \
        --capture-range=cudaProfilerApi --capture-range-end=stop -- --rounds 1 --samples 1 --profile 5 "$@" &&
        table "rounds launch by launch (nsys)" "$out/eager_cuda_gpu_kern_sum.csv"
    traced graph cuda_gpu_trace,cuda_api_sum --cuda-graph-trace=graph -- --rounds 1 --samples 5 "$@"
    traced node cuda_gpu_kern_sum,cuda_gpu_trace --cuda-graph-trace=node -- --rounds 1 --samples 5 "$@" &&
        table "replays of graphs, steps and rounds together (nsys)" "$out/node_cuda_gpu_kern_sum.csv"
else
    echo "profile.sh: nsys is not on PATH: no timelines; Nsight Systems has it" >&2
fi

if have ncu; then
    # Clocks are not fixed, because a round does not run at base clocks. Caches are flushed before each kernel (ncu's
    # default): in a round other weights evict a kernel's data, and ncu's second pass of a kernel would find its own
    # data there.
    metrics=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum
    metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__throughput.avg.pct_of_peak_sustained_elapsed
    step ncu --clock-control none --profile-from-start off --nvtx --kernel-name "regex:${KERNELS:-.}" \
        --metrics "$metrics" --import-source yes --force-overwrite --export "$out/ncu" \
        "$bench" round --device cuda --rounds 1 --samples 1 --profile 1 "$@" &&
        { ncu --import "$out/ncu.ncu-rep" --csv --page raw --print-units base >"$out/ncu.csv" 2>>"$log" ||
            failed $?; } &&
        table "one round, kernel by kernel (ncu)" "$out/ncu.csv"
else
    echo "profile.sh: ncu is not on PATH: no bytes; Nsight Compute has it" >&2
fi
cat "$out/kernels.txt"
exit $bad

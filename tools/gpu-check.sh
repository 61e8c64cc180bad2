#!/usr/bin/env bash
# Runs the kernel tests on this machine's GPU, from a pack of tools/gpu-pack.sh, in at most 8 minutes: first without a
# sanitizer, then, if compute-sanitizer works, some of them under each of its tools. Needs nothing but the driver.
#   pack/gpu-check.sh OUT            writes OUT/summary.txt and logs; exit code 0 if all passed
#   pack/gpu-check.sh OUT SECONDS    the tests only, within SECONDS: a step of gpu-report.sh
set -uo pipefail
[ $# = 1 ] || [[ $# = 2 && "$2" =~ ^[1-9][0-9]{0,5}$ ]] || { sed -n '2,5p' "$0"; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")" || exit 2
# Some containers keep the driver here. Last in the path, so that the loader's default comes first.
export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/usr/local/nvidia/lib64"
# Tests run on the software GPU by default.
export DFLASH_TEST_GPU=1
end=$((SECONDS + ${2:-460})) bad=0
finish() {
    rm -f "$out/last"
    say "$([ $bad = 0 ] && echo "all passed" || echo "NOT all passed"), $SECONDS s"
    exit $bad
}
say() { printf '%s\n' "$*" | tee -a "$out/summary.txt"; }

# step SECONDS LOG TITLE COMMAND...: a line of the summary, and all output in the log.
step() {
    local limit=$1 log=$out/$2 title=$3 start=$SECONDS status left=$((end - SECONDS)) word=ok
    shift 3
    [ "$left" -gt 5 ] || { say "SKIPPED  $title: no time left"; bad=1; return 1; }
    timeout -k 5 $((limit < left ? limit : left)) "$@" >"$out/last" 2>&1
    status=$?
    { echo "== $title: $*"; cat "$out/last"; } >>"$log"
    # Each test prints a line for the GPU.
    [ $status != 0 ] || grep -qE '^(on|opened in) ' "$out/last" || status=99
    [ $status = 0 ] || { word="FAILED $status"; bad=1; }
    [ $status != 99 ] || word="NOT ON THE GPU"
    [ $status != 124 ] || word="TOO LONG"
    say "$word  $title  $((SECONDS - start)) s  $(sed -n 's/^test result: [a-zA-Z]*\. \([0-9]* passed; [0-9]* failed\).*/\1/p' "$out/last")"
    return $status
}

rm -f "$out"/{summary.txt,tests.log,generate.log,{mem,race,init,sync}check.log}
say "commit   $(head -n 1 commit)$([ "$(wc -l <commit)" = 1 ] || echo ', with changes')"
facts=name,driver_version,memory.total,clocks.max.sm
say "card     $(timeout -k 1 $(((${2:-460} + 45) / 46)) nvidia-smi --query-gpu=$facts --format=csv,noheader 2>&1 | head -n 1)"
say "machine  $(nproc) cores, $(uname -r), $(ldd --version 2>&1 | head -n 1)"

# The second time, the driver has compiled kernels in its cache.
open=(./kernels --ignored --exact cuda::a_gpu_opens --show-output)
for turn in first second; do
    step 200 tests.log "opening the GPU, $turn time" "${open[@]}" || { cat "$out/last"; say "no GPU"; exit 1; }
    say "         $(grep -o "opened in .*" "$out/last")"
done

# Program and module: a module's tests are those of tests/PROGRAM/MODULE.rs.
for test in kernels/cuda kernels/pack kernels/read kernels/norm kernels/linear kernels/linear_bits kernels/prefill kernels/attention kernels/attention_tree kernels/sampler kernels/verify kernels/rounds kernels/passes kernels/graphs decoding/device decoding/lossless kernels/convolve kernels/selector kernels/markov kernels/lookup decoding/drafters kernels/trees kernels/rejection kernels/siblings kernels/chains decoding/device_verification; do
    program=${test%/*} module=${test#*/}
    [ -x "$program" ] || continue
    step 120 tests.log "$test" "./$program" --show-output "$module::" && continue
    # A failed kernel can leave the context of its process unusable: run each failed test again, alone.
    for name in $(sed -n 's/^test \([a-z0-9_:]*\) .*FAILED$/\1/p' "$out/last" | head -n 12); do
        step 40 tests.log "    $name, alone" "./$program" --show-output --exact "$name"
        grep -m 1 -A 2 'panicked at' "$out/last" | cut -c 1-300 | tee -a "$out/summary.txt"
    done
done

[ $# = 1 ] || finish

# dflash-gen with the built-in demo pair: every prompt with and without drafts; logits are compared, rates printed.
generate() { # generate LOG ARGS...
    local log=$1
    shift
    step 90 "$log" "dflash-gen $*" bash -c 'echo "on the GPU"; ./dflash-gen --device cuda --prompts prompts.jsonl "$@"' - "$@"
    grep -E '^ *(prompt|all)' "$out/last" | tee -a "$out/summary.txt"
}
if [ -x dflash-gen ]; then
    generate generate.log -n 128 --check-lossless
    generate generate.log -n 128 --check-lossless --temperature 0.8 --top-p 0.95 --seed 1
    generate generate.log -n 128 --check-lossless --tree 64
    generate generate.log -n 128 --check-lossless --tree 20 --temperature 0.8 --seed 1
    generate generate.log -n 128 --compare
    for how in "--adaptive" "--adaptive=0.5 --verify block" "--verify block" "--verify rejection --tree 64"; do
        # shellcheck disable=SC2086 # several flags
        generate generate.log -n 128 --temperature 1 --seed 1 --json $how
    done
    for batch in 1 8; do generate generate.log -n 128 --batch $batch --json; done
fi

# checker TOOL MODULE FILTERS...: the tests in tests/kernels/MODULE.rs whose names contain a filter.
checker() {
    local tool=$1 module=$2 tests
    shift 2
    mapfile -t tests < <(./kernels --list --format terse | sed -n 's/: test$//p' | grep "^$module::" | grep -F "$(printf '%s\n' "$@")")
    [ ${#tests[@]} -gt 0 ] || { say "NO TESTS  $tool $module $*"; bad=1; return 1; }
    step 60 "$tool.log" "$tool $module" compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 9 ./kernels --show-output --exact "${tests[@]}"
    grep -E '^=+ (ERROR|RACECHECK) SUMMARY' "$out/last" | tail -n 1 | tee -a "$out/summary.txt"
}
if ! command -v compute-sanitizer >/dev/null; then
    say "compute-sanitizer is not installed: no memcheck, racecheck, initcheck, synccheck"
elif ! step 60 memcheck.log "compute-sanitizer" compute-sanitizer --error-exitcode 9 --report-api-errors no "${open[@]}"; then
    say "no memcheck, racecheck, initcheck, synccheck: $(grep -m 1 '^=====' "$out/last" | cut -c 1-200)"
else
    # Invalid values in every index that a kernel reads from memory.
    checker memcheck linear invalid_rows_and_pages injection_gathers
    checker memcheck attention garbage_lengths
    checker memcheck sampler garbage_in_settings
    checker memcheck verify every_schedule
    checker memcheck rounds garbage_in_states
    checker memcheck pack rows_mapped_out_of_range embedding_reads
    checker memcheck norm full_norm
    checker memcheck trees garbage
    checker memcheck rejection garbage
    checker memcheck siblings garbage
    checker memcheck chains garbage
    # Every kernel whose threads share memory.
    checker racecheck linear_bits schedules_give_the_same
    checker racecheck prefill schedules_give_the_same
    checker racecheck attention schedules_give_equal_bits
    checker racecheck attention_tree equal_bits_in_every_schedule
    checker racecheck sampler sampler_is_the_same
    checker racecheck verify every_schedule
    checker racecheck rounds rounds_are_the_same
    checker racecheck norm residual_norm
    checker racecheck trees every_schedule
    checker racecheck rejection every_schedule
    checker racecheck siblings every_schedule
    checker racecheck chains every_schedule
    # initcheck: reads of memory that nothing has written. synccheck: barriers that not all threads of a block reach.
    checker initcheck rounds rounds_are_the_same
    checker initcheck trees rounds_of_trees
    checker synccheck linear_bits schedules_give_the_same
    checker synccheck attention schedules_give_equal_bits
    checker synccheck rejection every_schedule
    checker synccheck siblings every_schedule
    checker synccheck chains every_schedule
fi
finish

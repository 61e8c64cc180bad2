#!/usr/bin/env bash
# Tests and measures the engine on this machine's GPU, in at most 8 minutes even if something hangs: kernel tests, lossless
# checks, kernels, rounds of two published pairs with random weights, and generations. Needs nothing but the driver.
#   tools/gpu-report.sh [FLAGS] [OUT]     from a checkout in which `cargo build --release` and `cargo test --release
#   pack/gpu-report.sh [FLAGS] [OUT]      --no-run` have run, or from what tools/gpu-pack.sh packed
# OUT is a folder, new or empty [benches/results/CARD-DATE-COMMIT in a checkout, else results/CARD-DATE-COMMIT]. It gets
# summary.md, report.html, a JSON record of each step, and logs.
#   --device cuda|softgpu     softgpu: under `softgpu run`, the same steps on the demo pair, with counters, not times [cuda]
#   --bin DIR                 where dflash-gen and dflash-bench are [target/release in a checkout, else the pack]
#   --limit SECONDS           time for all steps; each step gets its share [480]
# Exit codes: 0 every step went well, 1 one failed, took too long or was left out (summary.md says which), 2 usage, 130
# interrupted. CUDA_VISIBLE_DEVICES chooses the GPU.
set -uo pipefail
usage() { printf 'gpu-report.sh: %s\n' "$*" >&2; exit 2; }

here=$(cd "$(dirname "$0")" && pwd)
device=cuda bin='' limit=480 out=''
while [ $# -gt 0 ]; do
    case $1 in
    --help | -h) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    --device | --bin | --limit)
        [ $# -gt 1 ] || usage "$1 has no value"
        declare "${1#--}=$2"
        shift ;;
    -*) usage "there is no flag $1: expected --device, --bin or --limit (--help says more)" ;;
    *) [ -z "$out" ] || usage "OUT is given twice, $out and $1"; out=$1 ;;
    esac
    shift
done
[[ $device =~ ^(cuda|softgpu)$ ]] || usage "--device is $device, expected cuda or softgpu"
[[ $limit =~ ^[1-9][0-9]{1,4}$ ]] || usage "--limit is $limit, expected 10 to 99999 seconds"
# In a pack everything is in one folder.
root=''
[ -f "$here/commit" ] || root=$(dirname "$here")
[ -n "$bin" ] || bin=${root:+$root/target/release}
bin=$(cd "${bin:-$here}" 2>/dev/null && pwd) || usage "--bin is ${bin:-$here}, which is not a folder"
for program in dflash-gen dflash-bench; do
    [ -x "$bin/$program" ] || usage "$bin has no $program: build it with cargo build --release or tools/gpu-pack.sh"
done

# Numbers of seconds below assume a limit of 480. The last twelfth is for the report and for processes that end late.
seconds() { echo $((($1 * limit + 479) / 480)); }
end=$((SECONDS + $(seconds 440))) reserved=430 bad=0
# Some containers keep the driver and its tools here. Last in the path, so that the system's default comes first.
export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/usr/local/nvidia/lib64" PATH="$PATH:/usr/local/nvidia/bin"
if [ -n "$root" ]; then
    commit=$(git -C "$root" describe --always --dirty --abbrev=12 2>/dev/null) || commit=unknown
else
    commit=$(head -n 1 "$here/commit" | cut -c 1-12)$([ "$(wc -l <"$here/commit")" -le 1 ] || echo -dirty)
fi
smi() { timeout -k 1 "$(seconds 10)" nvidia-smi -i "${CUDA_VISIBLE_DEVICES:-0}" "$@" 2>/dev/null; }
card='software GPU' driver=none
if [ "$device" = cuda ]; then
    IFS=, read -r card driver < <(smi --query-gpu=name,driver_version --format=csv,noheader)
    # nvidia-smi is not called again if it hangs or fails once.
    [ -n "$driver" ] || smi() { false; }
    [ -n "$card" ] ||
        card=$(sed -n 's/^Model:[[:space:]]*//p' /proc/driver/nvidia/gpus/*/information 2>/dev/null | head -n 1)
    card=${card:-unknown card} driver=${driver:-unknown, nvidia-smi does not say}
fi
state() { # state before|after: everything that nvidia-smi -q prints, such as clocks, power and other processes
    if [ "$device" = cuda ] && smi -q >"$scratch/smi"; then mv "$scratch/smi" "$out/logs/nvidia-smi-$1.log"; fi
}
date=$(date -u +%Y-%m-%d)
if [ -z "$out" ]; then
    name=$(printf '%s' "${card#NVIDIA }" | tr -c 'A-Za-z0-9.' '-' | tr -s '-')-$date-$commit
    base=${root:+$root/benches}
    out=${base:-$here}/results/$name
    for ((i = 2; i < 100; i++)); do [ -e "$out" ] || break; out=${base:-$here}/results/$name-$i; done
fi
[ -z "$(ls -A "$out" 2>/dev/null)" ] || usage "$out has files in it, expected a new or an empty folder"
mkdir -p "$out/logs" 2>/dev/null || usage "$out cannot be created: expected a folder that can"
out=$(cd "$out" && pwd)
scratch=$out/.scratch
mkdir "$scratch" || exit 2
# The driver caches compiled kernels in the home folder. If it cannot, it compiles them again in every process.
default_cache=${HOME:-/}/.nv/ComputeCache
if [ -z "${CUDA_CACHE_PATH:-}" ] && ! { mkdir -p "$default_cache" 2>/dev/null && [ -w "$default_cache" ]; }; then
    export CUDA_CACHE_PATH=$scratch/cache
fi

summary=$out/summary.md
say() { printf '%s\n' "$*" | tee -a "$summary"; }
# shellcheck disable=SC2329 # called by the trap
stop() {
    for group in $(jobs -p); do kill -KILL -- "-$group" 2>/dev/null; done
    say "interrupted"
    rm -rf "$scratch"
    exit 130
}
trap stop INT TERM HUP

# within SECONDS COMMAND...: returns the command's exit code, or 124 if it had to be killed. A process that survives
# SIGKILL (blocked in a broken driver) is abandoned. Each command leads a process group, so that its children are killed
# too.
set -m
within() {
    local until=$((SECONDS + $1)) signal child
    shift
    "$@" &
    child=$!
    while kill -0 "$child" 2>/dev/null && [ $SECONDS -lt $until ]; do sleep 0.1; done
    if kill -0 "$child" 2>/dev/null; then
        for signal in TERM KILL; do
            kill -$signal -- "-$child" 2>/dev/null
            for ((i = 0; i < 20; i++)); do kill -0 "$child" 2>/dev/null || break; sleep 0.1; done
        done
        disown "$child" 2>/dev/null
        return 124
    fi
    wait "$child"
}

# step SHARE NAME OUTPUT COMMAND...: stdout to OUTPUT, stderr to a log, and a row of the summary. A step may use its share
# of the 480 seconds and whatever the steps before it left over. The output of a failed step is kept with the logs.
step() {
    local share=$1 name=$2 file=$out/$3 log=$out/logs/$2.log start=$SECONDS status=0 word=ok note='' left
    shift 3
    reserved=$((reserved - share))
    left=$((end - SECONDS - $(seconds $reserved)))
    if [ $left -lt 1 ]; then
        leave_out "$name" "no time left"
        return
    fi
    printf '%s\n' "$*" >"$log"
    within $left "$@" </dev/null >"$scratch/out" 2>>"$log" || status=$?
    if [ $status = 0 ] && [ -s "$scratch/out" ]; then
        mv "$scratch/out" "$file"
    else
        # The reason is the last line of stderr.
        word="FAILED $status" bad=1 note=$(sed 1d "$log" | tail -n 1 | cut -c 1-300 | tr '|' '/')
        [ $status != 124 ] || word="TOO LONG" note="ended after $left s"
        [ $status != 0 ] || note="printed nothing"
        mv "$scratch/out" "$out/logs/$name.out"
    fi
    say "| $name | $word | $((SECONDS - start)) | $note |"
}
leave_out() { # leave_out NAME WHY
    say "| $1 | LEFT OUT | | $2 |"
    bad=1
}

# The folder where tests run: the pack, or links to the newest programs of a checkout.
pack=$here
if [ -n "$root" ]; then
    pack=$scratch/pack
    mkdir "$pack"
    ln -s "$here/gpu-check.sh" "$root/tests/data/prompts.jsonl" "$pack"
    mapfile -t names < <(sed -n 's/^for test in \(.*\); do$/\1/p' "$here/gpu-check.sh" |
        tr ' ' '\n' | cut -d/ -f1 | sort -u)
    for name in "${names[@]}"; do
        test=$(find "$root/target/release/deps" -maxdepth 1 -type f -perm -u+x -regex ".*/$name-[0-9a-f]*" \
            -printf '%T@ %p\n' 2>/dev/null | sort -n | tail -n 1 | cut -d ' ' -f 2-)
        [ -z "$test" ] || ln -s "$test" "$pack/$name"
    done
    printf '%s\n' "$commit" >"$pack/commit"
fi
prompts=$pack/prompts.jsonl

say "# $card, $date, $commit"
say
say "Driver ${driver# }; $(nproc) cores, $(uname -sr). Written by \`gpu-report.sh --device $device --limit $limit\`."
[ "$device" = cuda ] || say "On the software GPU: counters, no times."
say
say "| step | result | seconds | |"
say "| --- | --- | --- | --- |"
state before

if [ "$device" = cuda ]; then
    if [ -x "$pack/kernels" ]; then
        step 130 tests logs/tests.out "$pack/gpu-check.sh" "$out/tests" "$(seconds 125)"
    else
        reserved=$((reserved - 130))
        leave_out tests "they are not built: cargo test --release --no-run"
    fi
    length=128 repeat=(--repeat 5) kernels=(qwen3-8b --rows "1,16,64,128" --context 1024)
    pairs=(qwen3-4b qwen3-8b) rounds=(--batch '1-8*2' --context 1024 --acceptance "4,6")
else
    say "| tests | not here | | cargo test runs them |"
    head -n 2 "$prompts" >"$scratch/prompts.jsonl"
    reserved=225 prompts=$scratch/prompts.jsonl length=16 repeat=() kernels=(demo --rows "1,16" --context 64)
    pairs=(demo) rounds=(--batch "1,2" --context 64 --acceptance "2,4")
fi
gen=("$bin/dflash-gen" --device cuda --prompts "$prompts" -n "$length" --check-lossless --json)
step 25 lossless-greedy lossless-greedy.json "${gen[@]}"
step 25 lossless-sampled lossless-sampled.json "${gen[@]}" --temperature 0.8 --top-p 0.95 --seed 1
bench() { # bench SHARE NAME SUBCOMMAND FLAGS...
    local share=$1 name=$2
    shift 2
    step "$share" "$name" "$name.json" "$bin/dflash-bench" "$@" --device cuda --json
}
bench 80 "kernels-${kernels[0]}" kernels --model "${kernels[@]}"
for pair in "${pairs[@]}"; do
    share=60
    [ "$pair" != qwen3-8b ] || share=75
    bench $share "round-$pair" round --model "$pair" "${rounds[@]}"
done
# With fewer than 5 rounds `compare` gives no result.
bench 35 generate-demo generate --prompts "$prompts" -n "$length" "${repeat[@]}"
state after

if [ -f "$out/tests/summary.txt" ]; then
    say
    say "## Tests"
    say
    sed 's/^/    /' "$out/tests/summary.txt" | tee -a "$summary"
fi
say
for kind in greedy sampled; do
    record=$out/lossless-$kind.json
    [ -f "$record" ] || continue
    number() { grep -o "\"$1\":[0-9]*" "$record" | head -n 1 | cut -d : -f 2; }
    say "Lossless, $kind: $(number tokens) tokens of $(number rounds) rounds identical, with all logits of" \
        "$(number compared) rows."
done
records=()
for record in "$out"/{kernels,round,generate}-*.json; do [ ! -f "$record" ] || records+=("$record"); done
if [ ${#records[@]} -gt 0 ]; then
    say
    if within "$(seconds 20)" "$bin/dflash-bench" show "${records[@]}" --markdown --report "$out/report.html" \
        </dev/null >"$scratch/out" 2>"$out/logs/show.log"; then
        tee -a "$summary" <"$scratch/out"
    else
        bad=1
        say "The records could not be shown: $(tail -n 1 "$out/logs/show.log" | cut -c 1-300)"
    fi
fi
say
say "$([ $bad = 0 ] && echo "All steps went well" || echo "NOT all steps went well"), $SECONDS s."
rm -rf "$scratch"
printf '%s\n' "$out" >&2
exit $bad

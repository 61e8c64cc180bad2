#!/usr/bin/env python3
"""Compares the machine code of all kernels, for sm_80 and sm_90, with cuda/expected.txt; with wgmma, for sm_90a.

Each kernel must have at most the stated registers and static shared memory, no spills, no local memory, and the
instructions that its line names. These fail too: a kernel without a line, a line without a kernel, a compiler warning
(for example that it serialises wgmma), inline assembly outside cuda/common/ptx.cuh, and a float product or sum in the
PTX that ptxas or the driver may fuse. `--write` prints a new table with the current figures, for a change that is meant
to alter them.
"""

import concurrent.futures
import itertools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGETS = ["sm_80", "sm_90"]
# The instructions that a word in expected.txt requires.
WORDS = {
    "hgmma": re.compile(r"\bHGMMA\.64x256x16\.F32\.BF16"),
    "hmma": re.compile(r"\bHMMA\.16816\.F32\.BF16"),
    "ldg128": re.compile(r"\bLDG\S*\.128"),
    "ldgsts128": re.compile(r"\bLDGSTS\S*\.128"),
    "ldsm": re.compile(r"\bLDSM\b"),
    "lds128": re.compile(r"\bLDS\S*\.128"),
    # Eight 16-byte loads before the wait for the previous kernel, where there is such a wait.
    "early": re.compile(r"\A(?![\s\S]*ACQBULK)|(\bLDG\S*\.128[\s\S]*?){8}ACQBULK"),
    # A prefetch into L2 before that wait.
    "prefetch": re.compile(r"\A(?![\s\S]*ACQBULK)|\bUBLKPF\b[\s\S]*?ACQBULK"),
}
# A product or sum without a rounding mode. ptxas may fuse such a pair into one fma, which has other bits.
FUSIBLE = re.compile(r"\b(mul|add|sub)(\.ftz)?(\.sat)?\.f(32|64)\b")


def find(tool):
    """Path of the tool: beside $NVCC, the pinned one, in $CUDA_HOME, or on PATH."""
    places = [ROOT / ".cuda/nvidia/cu13/bin" / tool]
    if "NVCC" in os.environ:
        places.insert(0, pathlib.Path(os.environ["NVCC"]).parent / tool)
    if "CUDA_HOME" in os.environ:
        places.append(pathlib.Path(os.environ["CUDA_HOME"]) / "bin" / tool)
    for place in places:
        if place.exists():
            return str(place)
    found = shutil.which(tool)
    if not found:
        sys.exit(f"check-ptx: no {tool}; tools/get-nvcc.sh fetches it")
    return found


def compile_one(source, target, folder):
    """Kernels of one file for one target, {name: {registers, stack, spills, code}}, and the warnings of the compiler.
    A file with wgmma has kernels for sm_90a only, as in build.rs."""
    if source.stem.endswith("_wgmma"):
        if target == "sm_80":
            return {}, []
        target = "sm_90a"
    ptx, cubin = (folder / f"{source.stem}.{target}.{kind}" for kind in ("ptx", "cubin"))
    virtual = target.replace("sm", "compute")
    flags = ["-ptx", "-std=c++17", "-O3", "-fmad=false", "-I", str(ROOT / "cuda"), f"-arch={virtual}"]
    output = ""
    for command in (
        [find("nvcc"), *flags, str(source), "-o", str(ptx)],
        [find("ptxas"), "-v", f"-arch={target}", str(ptx), "-o", str(cubin)],
    ):
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            sys.exit(run.stderr)
        output += run.stderr
    kernels, name = {}, None
    warnings = [line for line in output.splitlines() if re.search(r"\bwarning\b|Performance Loss", line)]
    warnings += [f"{line.strip()} may be fused" for line in ptx.read_text().splitlines() if FUSIBLE.search(line)]
    for line in output.splitlines():
        if m := re.search(r"Compiling entry function '(\w+)'", line):
            name = m[1]
            kernels[name] = {"code": ""}
        elif m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernels[name] |= {"stack": int(m[1]), "spills": int(m[2]) + int(m[3])}
        elif m := re.search(r"Used (\d+) registers", line):
            smem = re.search(r"(\d+) bytes smem", line)
            kernels[name] |= {"registers": int(m[1]), "shared": int(smem[1]) if smem else 0}
    if not kernels:
        return kernels, warnings
    code = subprocess.run([find("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    for part in re.split(r"^\.text\.", code, flags=re.M)[1:]:
        name = part.split(":", 1)[0]
        if name in kernels:
            kernels[name]["code"] = part
    return kernels, warnings


def expectations():
    """{kernel: ([registers per target, None if it does not exist there], shared bytes, [words])} from expected.txt."""
    table = {}
    for number, line in enumerate((ROOT / "cuda/expected.txt").read_text().splitlines(), 1):
        fields = line.split("#")[0].split()
        if not fields:
            continue
        numbers, words = fields[1:4], fields[4:]
        valid = len(numbers) == 3 and numbers[2].isdigit() and all(f.isdigit() or f == "-" for f in numbers)
        if not valid or not set(words) <= set(WORDS):
            sys.exit(f"cuda/expected.txt:{number}: expected `kernel registers registers shared [{' '.join(WORDS)}]`")
        table[fields[0]] = ([None if f == "-" else int(f) for f in numbers[:2]], int(numbers[2]), words)
    return table


def main():
    table, faults, seen, shared = expectations(), [], {}, {}
    for source in sorted((ROOT / "cuda").rglob("*")):
        if source.suffix in (".cu", ".h", ".cuh") and source.name != "ptx.cuh":
            for number, line in enumerate(source.read_text().splitlines(), 1):
                if re.search(r"\b(asm|__asm__)\b\s*(volatile)?\s*\(", line.split("//")[0]):
                    faults.append(f"{source.name}:{number}: inline assembly belongs in cuda/common/ptx.cuh")
    with tempfile.TemporaryDirectory() as folder:
        jobs = list(itertools.product(sorted((ROOT / "cuda").rglob("*.cu")), TARGETS))
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = list(pool.map(lambda job: compile_one(*job, pathlib.Path(folder)), jobs))
    for (source, target), (kernels, warnings) in zip(jobs, compiled):
        index = TARGETS.index(target)
        faults += [f"{source.name} for {target}: {line}" for line in warnings]
        for name, kernel in kernels.items():
            seen.setdefault(name, [None] * len(TARGETS))[index] = kernel["registers"]
            shared[name] = max(shared.get(name, 0), kernel["shared"])
            where = f"{source.name}: {name} on {target}"
            if kernel["stack"] or kernel["spills"]:
                faults.append(f"{where}: {kernel['stack']} bytes of local memory, {kernel['spills']} spilled; expected none")
            if name not in table:
                continue
            limits, most_shared, words = table[name]
            if kernel["shared"] > most_shared:
                faults.append(f"{where}: {kernel['shared']} bytes of static shared memory, expected at most {most_shared}")
            if limits[index] is None:
                faults.append(f"{where}: expected not to exist there")
            elif kernel["registers"] > limits[index]:
                faults.append(f"{where}: {kernel['registers']} registers, expected at most {limits[index]}")
            for word in words:
                if not WORDS[word].search(kernel["code"]):
                    faults.append(f"{where}: no {word} in the machine code")
    for name, (limits, *_) in table.items():
        for index, target in enumerate(TARGETS):
            if limits[index] is not None and name in seen and seen[name][index] is None:
                faults.append(f"cuda/expected.txt has registers of {name} on {target}, where it does not exist")
    faults += [f"kernel {name} has no line in cuda/expected.txt" for name in seen if name not in table]
    faults += [f"cuda/expected.txt names {name}, which no file in cuda/ defines" for name in table if name not in seen]
    if sys.argv[1:] == ["--write"]:
        for name, registers in seen.items():
            words = table.get(name, ([], 0, []))[2]
            figures = [*(f"{'-' if r is None else r:>5}" for r in registers), f"{shared[name]:>6}"]
            print(" ".join([f"{name:<28}", *figures, *words]).rstrip())
        return
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults:
        sys.exit(1)
    print(f"check-ptx: {len(seen)} kernels as expected")


main()

#!/usr/bin/env python3
"""Acceptance length of every draft shape with every verification method, and the speed predicted from it.

Runs dflash-gen on the CPU over a file of prompts and prints three tables in Markdown.

Columns of the first table:

    tau            tokens per round, bonus token included, over all rounds of all prompts; with several seeds their
                   mean and its standard error. The last round of an answer counts in full
    drafts/token   drafts that the target verified per emitted token
    identical      answers that equal autoregressive decoding with the same seed, for methods that guarantee it; if
                   any answer differs, the exit code is 1
    tok/s          predicted for --model on --card by dflash-bench roofline, from bytes and operations alone, with the
                   acceptance of the drafter that ran: an upper bound, not a measurement

The second table has the acceptance rate of a chain's drafts by position, and the result of the cost model for it: how
many drafts pay off (dflash-bench roofline --curve), and which tree. The third table, for qwen3-8b only, applies the
model to published acceptance lengths, assuming equal acceptance at every position. At temperature 0 there is one seed and
one method, match, because all methods accept the same drafts there. Combinations that dflash-gen refuses are left out
and named on stderr. Needs Python 3.10 or newer and nothing else:

    cargo build --release && python3 tools/acceptance.py
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from records import wholes

ROOT = Path(__file__).resolve().parent.parent

# Name, flags ({half}: half the temperature), whether the output equals AR decoding, whether it verifies trees.
METHODS = [
    ("match", "", True, True),
    ("match, coupled", "--coupled", True, False),
    ("match, coupled, drafts at T/2", "--coupled --draft-temperature {half}", True, False),
    ("rejection", "--verify rejection", False, True),
    ("rejection, drafts at T/2", "--verify rejection --draft-temperature {half}", False, False),
    ("block", "--verify block", False, True),
]

# Qwen3-8B in the DDTree paper, arXiv 2604.12989: set, temperature, acceptance length and speed-up of DFlash, and the
# same of DDTree with the best of seven budgets (16 to 1024 nodes). The paper does not say which budget was best.
PUBLISHED = [
    ("MATH-500", 0, 7.79, 5.56, 10.73, 7.52),
    ("GSM8K", 0, 6.57, 4.78, 9.54, 6.75),
    ("HumanEval", 0, 6.61, 4.84, 9.67, 6.90),
    ("MT-Bench", 0, 4.28, 2.56, 6.58, 4.10),
    ("Alpaca", 0, 3.12, 2.07, 5.09, 3.36),
    ("MATH-500", 1, 6.46, 4.56, 9.54, 6.59),
    ("MT-Bench", 1, 3.77, 2.30, 6.02, 3.75),
]
PUBLISHED_BLOCK = 16
PUBLISHED_TREES = [64, 128, 256]

# One row of the first table. tree: rows of the tree, None for a chain.
Cell = namedtuple("Cell", "method tree flags identical")
AR = Cell("AR", None, "--draft none", True)


class Refused(Exception):
    """A program failed: its exit code and its message."""


def temperatures(text):
    """A list of numbers, kept as text for dflash-gen."""
    found = text.split(",")
    for part in found:
        float(part)
    return found


def flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", default=ROOT / "tests/data/prompts.jsonl", help="file of prompts, as for dflash-gen")
    parser.add_argument("--bin", type=Path, default=ROOT / "target/release", help="folder of dflash-gen and dflash-bench")
    parser.add_argument("--tree", type=wholes, default=[8, 16, 32, 64], metavar="LIST", help="tree sizes in rows")
    parser.add_argument("--temperature", type=temperatures, default=["0", "0.7", "1"], metavar="LIST")
    parser.add_argument("-n", default="128", help="tokens per answer")
    parser.add_argument("--seed", type=wholes, default=[1, 2, 3, 4, 5], metavar="LIST")
    parser.add_argument("--model", default="qwen3-8b", help="model of the prediction, as for dflash-bench roofline")
    parser.add_argument("--card", default="H200")
    parser.add_argument("--context", default="1024", help="positions in the context of the prediction")
    return parser.parse_args()


def run(command):
    """Runs a command and returns its stdout."""
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    except OSError as error:
        raise Refused(2, f"--bin has no {command[0].name}: {error.strerror}, expected the folder that cargo build writes") from None
    if done.returncode:
        raise Refused(done.returncode, done.stderr.strip())
    return done.stdout


def answers(args, cell, temperature, seed):
    command = [args.bin / "dflash-gen", "--device", "cpu", "--prompts", args.prompts, "-n", args.n, "--json", "-q"]
    command += ["--temperature", temperature, "--seed", seed]
    command += cell.flags.format(half=float(temperature) / 2).split()
    records = [json.loads(line) for line in run(command).splitlines()]
    if not all_values(records, "accepted"):
        raise Refused(2, f"-n is {args.n}, which gives no round: expected a larger number")
    return records


def cells(trees, temperature):
    """Rows of the first table at one temperature."""
    for method, more, identical, with_trees in METHODS:
        if method == "match" or float(temperature) > 0:
            yield Cell(method, None, more, identical)
            yield from (Cell(method, tree, f"{more} --tree {tree}", identical) for tree in trees if with_trees)


def all_answers(args):
    """Records by cell, temperature and seed, without the cells that dflash-gen refused."""
    wanted = []
    for temperature in args.temperature:
        seeds = args.seed if float(temperature) > 0 else args.seed[:1]
        wanted += [(cell, temperature, seed) for cell in [AR, *cells(args.tree, temperature)] for seed in seeds]
    found, left_out = {}, {}
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        runs = {pool.submit(answers, args, *key): key for key in wanted}
        for done, future in enumerate(as_completed(runs), 1):
            cell = runs[future][0]
            try:
                found[runs[future]] = future.result()
            except Refused as refused:
                code, message = refused.args
                if code not in (2, 4) or cell.tree is None and cell.method in ("AR", "match"):
                    raise
                left_out[cell] = message
            if sys.stderr.isatty():
                print(f"\r{done} of {len(runs)} runs", end="\n" * (done == len(runs)), file=sys.stderr, flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    for cell, message in left_out.items():
        print(f"left out: {cell.method}{f', tree of {cell.tree}' if cell.tree else ''}: {message}", file=sys.stderr)
    return {key: records for key, records in found.items() if key[0] not in left_out}


def roofline(args, more):
    """Rows that dflash-bench roofline predicts."""
    command = [args.bin / "dflash-bench", "roofline", "--model", args.model, "--card", args.card]
    return json.loads(run(command + ["--context", args.context, "--json"] + more))["rows"]


def predictions(args, rows):
    """Milliseconds of an AR step, and of a round by its number of rows."""
    found = roofline(args, ["--tree", ",".join(map(str, sorted(rows)))])
    ar = next(row["median"] for row in found if row["name"] == "AR step")
    return ar, {row["parameters"]["tree"]: row["median"] for row in found if row["name"] == "round"}


def cheapest(args, curve):
    """The cheapest round by the cost model. curve: acceptance of each draft given that those before it are accepted."""
    found = roofline(args, ["--curve", ",".join(f"{p:.6f}" for p in curve)])
    row = next(row for row in found if row["name"] == "DFlash, cheapest chain of the curve")
    return {"tok/s": row["median"], **row["numbers"]}


def all_values(records, field):
    """The field's values for all rounds of all prompts."""
    return [n for record in records for n in record[field]]


def curve_of(accepted, drafts):
    """Acceptance of each draft given that those before it are accepted, as far as it was observed. accepted: tokens per
    round, bonus token included."""
    reached = [sum(n > i for n in accepted) for i in range(drafts + 1)]
    return [after / before for before, after in zip(reached, reached[1:]) if before]


def equal_acceptance(tau, drafts):
    """The acceptance probability that gives tau if it is equal for all drafts of a chain."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(middle**i for i in range(drafts + 1)) < tau:
            low = middle
        else:
            high = middle
    return low


def line(row):
    print("| " + " | ".join(row) + " |", flush=True)


def head(*columns):
    line(columns)
    print("|" + "---|" * len(columns), flush=True)


def main():
    args = flags()
    roofline(args, [])  # Wrong flags are reported before anything runs.
    found = all_answers(args)
    chain = 1 + max(n for (cell, *_), records in found.items() if (cell.method, cell.tree) == ("match", None)
                    for n in all_values(records, "drafted"))
    ar_ms, round_ms = predictions(args, {chain, *args.tree, PUBLISHED_BLOCK, *PUBLISHED_TREES})

    def rate(tau, rows):
        """Predicted tokens per second, and the ratio to AR decoding."""
        return [f"{1000 * tau / round_ms[rows]:.0f}", f"{tau * ar_ms / round_ms[rows]:.2f}"]

    where = f"{args.model} on {args.card}"
    differs, best = False, {}
    head("T", "drafts", "method", "tau", "drafts/token", "identical", f"predicted tok/s, {where}", "x AR")
    for temperature in args.temperature:
        for cell in cells(args.tree, temperature):
            runs = {seed: records for (other, at, seed), records in found.items() if (other, at) == (cell, temperature)}
            if not runs:
                continue
            taus = [statistics.mean(all_values(records, "accepted")) for records in runs.values()]
            tau, text = statistics.mean(taus), f"{statistics.mean(taus):.3f}"
            if len(taus) > 1:
                text += f" ± {statistics.stdev(taus) / len(taus) ** 0.5:.3f}"
            all_records = [record for records in runs.values() for record in records]
            same = sum(own["tokens"] == other["tokens"] for seed, records in runs.items()
                       for own, other in zip(records, found[AR, temperature, seed], strict=True))
            differs |= cell.identical and same < len(all_records)
            drafts = sum(all_values(all_records, "drafted")) / sum(all_values(all_records, "accepted"))
            shape = f"tree of {cell.tree}" if cell.tree else f"chain of {chain}"
            identical = f"{same} of {len(all_records)}" if cell.identical else ""
            line([temperature, shape, cell.method, text, f"{drafts:.1f}", identical, *rate(tau, cell.tree or chain)])
            if cell.method == "match" and cell.tree:
                best[temperature] = max(best.get(temperature, (0, 0)), (tau / round_ms[cell.tree], cell.tree))

    print()
    head("T", "acceptance of each draft of the chain given those before it, match", "drafts that pay", "tau",
         f"predicted tok/s, {where}", "x AR", "tree rows that pay", "predicted tok/s")
    for temperature in args.temperature:
        accepted = [n for (cell, at, _), records in found.items()
                    if (cell.method, cell.tree, at) == ("match", None, temperature)
                    for n in all_values(records, "accepted")]
        curve = curve_of(accepted, chain - 1)
        model = cheapest(args, curve)
        tree = [f"{best[temperature][1]}", f"{1000 * best[temperature][0]:.0f}"] if temperature in best else ["", ""]
        line([temperature, " ".join(f"{p:.2f}" for p in curve), str(model["drafts"]), f"{model['tokens']:.3f}",
              f"{model['tok/s']:.0f}", f"{model['speed-up']:.2f}", *tree])

    if args.model != "qwen3-8b":
        return int(differs)
    print()
    predicted = [f"predicted with {shape} of {rows} ({round_ms[rows]:.2f} ms a round): tok/s, x AR"
                 for shape, rows in [("a chain", PUBLISHED_BLOCK), *(("a tree", rows) for rows in PUBLISHED_TREES)]]
    head("set", "T", "DFlash, published: tau, speed-up", "p per draft", "drafts that pay", predicted[0],
         "DDTree, published: tau, speed-up", *predicted[1:])
    for name, temperature, tau, speed, tree_tau, tree_speed in PUBLISHED:
        p = equal_acceptance(tau, PUBLISHED_BLOCK - 1)
        pays = cheapest(args, [p] * (PUBLISHED_BLOCK - 1))["drafts"]
        line([name, str(temperature), f"{tau:.2f}, {speed:.2f}", f"{p:.2f}", str(pays),
              ", ".join(rate(tau, PUBLISHED_BLOCK)), f"{tree_tau:.2f}, {tree_speed:.2f}",
              *(", ".join(rate(tree_tau, rows)) for rows in PUBLISHED_TREES)])
    return int(differs)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Refused as refused:
        print(refused.args[1], file=sys.stderr)
        sys.exit(refused.args[0])

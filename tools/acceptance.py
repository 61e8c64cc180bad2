#!/usr/bin/env python3
"""What drafts of every shape are worth: acceptance length of chains and trees, and what it would bring on a card.

Runs dflash-gen over prompts on the CPU, plainly and with every shape at every temperature, holds each answer against the
plain one, and prints a Markdown table:

    tau            tokens per round, the target's own included, over all rounds of all prompts
    drafts/token   drafts that the target ran for each token
    identical      answers that are plain decoding's, token for token; fewer than all makes the exit code 1
    tok/s          predicted for --model on --card by dflash-bench floor, from bytes and operations alone, as if its
                   drafter were accepted as the one that ran: an upper bound, and never a measurement

A shape is "chain", or the rows of a tree, the anchor counted. Needs Python 3.10 or newer and nothing else:

    cargo build --release && python tools/acceptance.py
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", default=ROOT / "tests/data/prompts.jsonl", help="as dflash-gen takes them")
    parser.add_argument("--bin", type=Path, default=ROOT / "target/release", help="where the two programs are")
    parser.add_argument("--tree", default="8,16,32,64", help="rows of trees")
    parser.add_argument("--temperature", default="0,0.7,1", help="list")
    parser.add_argument("-n", default="128", help="tokens of an answer")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--model", default="qwen3-8b", help="of the prediction, as dflash-bench floor takes it")
    parser.add_argument("--card", default="H200")
    parser.add_argument("--context", default="1024", help="positions that its sequence has")
    return parser.parse_args()


def run(command):
    """Its stdout; its own complaint and exit code where it fails."""
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def answers(args, temperature, more):
    command = [args.bin / "dflash-gen", "--device", "cpu", "--prompts", args.prompts, "-n", args.n, "--json", "-q"]
    command += ["--temperature", temperature, "--seed", args.seed]
    return [json.loads(line) for line in run(command + more).splitlines()]


def predictions(args, rows):
    """Milliseconds of a plain step, and of a round by its rows."""
    command = [args.bin / "dflash-bench", "floor", "--model", args.model, "--card", args.card]
    command += ["--context", args.context, "--tree", ",".join(map(str, rows)), "--json"]
    record = json.loads(run(command))
    found = [(row["name"], row["parameters"].get("tree"), row["median"]) for row in record["rows"]]
    plain = next(ms for name, _, ms in found if name == "plain step")
    return plain, {tree: ms for name, tree, ms in found if name == "round"}


def main():
    args = flags()
    trees = [int(rows) for rows in args.tree.split(",")]
    plain_ms, round_ms = None, {}
    wrong = False
    print(f"| T | shape | tau | drafts/token | identical | predicted tok/s, {args.model} on {args.card} | times plain |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for temperature in args.temperature.split(","):
        plain = answers(args, temperature, ["--draft", "none"])
        for tree in [None, *trees]:
            records = answers(args, temperature, ["--tree", tree] if tree else [])
            accepted = [n for record in records for n in record["accepted"]]
            drafted = [n for record in records for n in record["drafted"]]
            if plain_ms is None:
                chain = max(drafted) + 1
                plain_ms, round_ms = predictions(args, sorted({chain, *trees}))
            same = sum(own["tokens"] == other["tokens"] for own, other in zip(records, plain))
            wrong |= same < len(plain)
            tau, ms = sum(accepted) / len(accepted), round_ms[tree or chain]
            cells = [temperature, f"tree of {tree}" if tree else f"chain of {chain}", f"{tau:.2f}"]
            cells += [f"{sum(drafted) / sum(accepted):.1f}", f"{same} of {len(plain)}"]
            cells += [f"{1000 * tau / ms:.0f}", f"{tau * plain_ms / ms:.2f}"]
            print("| " + " | ".join(cells) + " |", flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())

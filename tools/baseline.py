#!/usr/bin/env python3
"""Measures PyTorch on the CPU and dflash-gen with the same prompts, on one machine in one run.

Needs Python 3.10 or newer with

    pip install torch transformers

(any build of torch: only the CPU is used, and nothing is downloaded). Rows of the table:

    torch plain    autoregressive (AR) decoding: Hugging Face Transformers, `generate`, greedy, f32 from bf16 weights
    torch dflash   a port of DFlash: the drafter below, the target through Transformers with DynamicCache
    ours plain     AR decoding: dflash-gen --draft none    (with --ours PATH)
    ours dflash    dflash-gen                              (with --ours PATH)

The script compares every answer, and the accepted tokens of every round, with those that the reference implementation
recorded (tests/data/oracle.json). It reports any difference, and the exit code is then 1. tok/s is new tokens over the
seconds of the whole request, with prefill and without loading. tau is tokens per round over all rounds of all prompts;
mean tau is the mean of the prompts' own tau, which papers report. Example:

    cargo build --release && python3 tools/baseline.py --ours target/release/dflash-gen

`tools/baseline.py rounds` measures steps and rounds on a GPU instead (tools/baseline_rounds.py; --help says more).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

ROOT = Path(__file__).resolve().parent.parent


class Drafter:
    """The DFlash drafter in f32: context features in, one block of drafts out. Batch 1, full attention."""

    def __init__(self, folder, target):
        config = json.loads((folder / "config.json").read_text())
        own = config["dflash_config"]
        self.taps = own["target_layer_ids"]
        self.mask = own["mask_token_id"]
        self.block = own.get("block_size", config.get("block_size", 16))
        self.layers = config["num_hidden_layers"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim, self.eps = config["head_dim"], config["rms_norm_eps"]
        self.weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        self.embedding = target.get_input_embeddings().weight  # [vocab, hidden]
        self.head = target.get_output_embeddings().weight  # [vocab, hidden]
        half = torch.arange(0, self.head_dim, 2).float() / self.head_dim
        angles = torch.outer(torch.arange(config["max_position_embeddings"]).float(), config["rope_theta"] ** -half)
        self.cos, self.sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)  # [positions, head_dim]
        self.reset()

    def reset(self):
        """Clears the context: keys and values per layer, [1, kv_heads, positions, head_dim]."""
        empty = torch.zeros(1, self.kv_heads, 0, self.head_dim)
        self.keys, self.values = [empty] * self.layers, [empty] * self.layers

    def norm(self, x, name):
        weight = self.weights[name + ".weight"]
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def linear(self, x, name):
        return F.linear(x, self.weights[name + ".weight"])

    def split(self, x, heads):
        return x.view(x.shape[0], heads, self.head_dim).transpose(0, 1).unsqueeze(0)

    def rotate(self, x, start):
        rows = slice(start, start + x.shape[2])
        first, second = x.chunk(2, dim=-1)
        return x * self.cos[rows] + torch.cat((-second, first), dim=-1) * self.sin[rows]

    def keys_values(self, x, layer, start):
        attention = f"layers.{layer}.self_attn."
        keys = self.norm(self.split(self.linear(x, attention + "k_proj"), self.kv_heads), attention + "k_norm")
        return self.rotate(keys, start), self.split(self.linear(x, attention + "v_proj"), self.kv_heads)

    def extend(self, features):
        """Appends positions to the context; features [rows, taps * hidden]."""
        context, start = self.norm(self.linear(features, "fc"), "hidden_norm"), self.keys[0].shape[2]
        for layer in range(self.layers):
            keys, values = self.keys_values(context, layer, start)
            self.keys[layer] = torch.cat((self.keys[layer], keys), dim=2)
            self.values[layer] = torch.cat((self.values[layer], values), dim=2)

    def draft(self, anchor):
        """The block - 1 drafts after the anchor, whose position follows the context."""
        start = self.keys[0].shape[2]
        x = self.embedding[torch.tensor([anchor] + [self.mask] * (self.block - 1))]  # [block, hidden]
        for layer in range(self.layers):
            prefix = f"layers.{layer}."
            y = self.norm(x, prefix + "input_layernorm")
            queries = self.split(self.linear(y, prefix + "self_attn.q_proj"), self.heads)
            queries = self.rotate(self.norm(queries, prefix + "self_attn.q_norm"), start)
            keys, values = self.keys_values(y, layer, start)
            keys, values = torch.cat((self.keys[layer], keys), dim=2), torch.cat((self.values[layer], values), dim=2)
            attended = F.scaled_dot_product_attention(queries, keys, values, enable_gqa=True)
            x = x + self.linear(attended[0].transpose(0, 1).flatten(1), prefix + "self_attn.o_proj")
            z = self.norm(x, prefix + "post_attention_layernorm")
            gate, up = self.linear(z, prefix + "mlp.gate_proj"), self.linear(z, prefix + "mlp.up_proj")
            x = x + self.linear(F.silu(gate) * up, prefix + "mlp.down_proj")
        return F.linear(self.norm(x, "norm")[1:], self.head).argmax(-1).tolist()


def autoregressive(target, prompt, new_tokens):
    """Greedy continuation by Transformers' own loop."""
    ids = torch.tensor([prompt])
    return target.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, use_cache=True
    )[0].tolist()


def dflash(target, drafter, prompt, new_tokens, stop_ids):
    """Greedy continuation by DFlash, and the tokens of each round.

    Rounds are counted as in the recorded reference: every block is drafted in full, rounds continue until `new_tokens`
    tokens follow the token of the prefill, and the last round counts in full although the answer is cut.
    """
    drafter.reset()
    cache = DynamicCache(config=target.config)

    def run(ids, keep):
        out = target(
            torch.tensor([ids]), past_key_values=cache, use_cache=True, output_hidden_states=True, logits_to_keep=keep
        )
        # hidden_states[0] is the embedding, so layer t's output is entry t + 1.
        features = torch.cat([out.hidden_states[tap + 1][0] for tap in drafter.taps], dim=-1)
        return out.logits[0].argmax(-1).tolist(), features

    best, features = run(prompt, 1)
    tokens, rounds, end = prompt + best, [], len(prompt) + new_tokens
    anchor = len(prompt)
    while anchor < end and tokens[-1] not in stop_ids:
        drafter.extend(features)
        drafts = drafter.draft(tokens[anchor])
        best, features = run([tokens[anchor]] + drafts, 0)
        accepted = next((i for i, draft in enumerate(drafts) if draft != best[i]), len(drafts))
        produced = drafts[:accepted] + [best[accepted]]
        rounds.append(len(produced))
        stop = next((i for i, token in enumerate(produced) if token in stop_ids), None)
        tokens += produced if stop is None else produced[: stop + 1]
        surplus = anchor + drafter.block - (len(tokens) - 1)
        anchor = len(tokens) - 1
        if surplus > 0:
            cache.crop(-surplus)
        features = features[: accepted + 1]
    return tokens[:end], rounds


def ours(binary, prompts, new_tokens, flags):
    """Runs dflash-gen over all prompts; returns one record per prompt."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.writelines(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
        file.flush()
        command = [binary, "--prompts", file.name, "-n", str(new_tokens), "--json", "--quiet", *flags]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} exited with {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.strip()]


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=ROOT / "demo/target", help="folder of the target")
    parser.add_argument("--drafter", type=Path, default=ROOT / "demo/drafter", help="folder of the drafter")
    parser.add_argument("--prompts", type=Path, default=ROOT / "tests/data/prompts.jsonl")
    parser.add_argument("--oracle", type=Path, default=ROOT / "tests/data/oracle.json")
    parser.add_argument("-n", type=int, default=128, help="new tokens per prompt (default 128)")
    parser.add_argument("--count", type=int, help="only the first COUNT prompts")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions; the median is reported (default 3)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of torch; to limit those of dflash-gen, use taskset")
    parser.add_argument("--ours", metavar="PATH", help="path of dflash-gen, for its rows")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args = parser.parse_args()
    if args.n < 1 or args.repeat < 1 or args.threads < 1 or (args.count is not None and args.count < 1):
        parser.error("-n, --count, --repeat and --threads must be at least 1")

    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    drafter = Drafter(args.drafter, target)
    eos = target.generation_config.eos_token_id
    stop_ids = set(eos if isinstance(eos, list) else [] if eos is None else [eos])

    texts = [json.loads(line)["prompt"] for line in args.prompts.read_text().splitlines() if line.strip()][: args.count]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    # Answers are recorded for one token budget. With a smaller budget the tokens are a prefix of them.
    recorded = json.loads(args.oracle.read_text())
    budget = recorded["summary"]["max_new_tokens"]
    known = {prompt["prompt"]: prompt for prompt in recorded["prompts"]}
    faults = []

    def check(row, index, tokens, rounds=None):
        oracle = known.get(texts[index])
        if oracle is None or args.n > budget:
            return
        if tokens != oracle["output_ids"][: len(prompts[index]) + args.n]:
            faults.append(f"{row}: prompt {index}: tokens differ from the recorded ones")
        if rounds is not None and args.n == budget and rounds != oracle["acceptance_lengths"]:
            faults.append(f"{row}: prompt {index}: acceptance lengths differ from the recorded ones")

    def torch_ar():
        tokens, seconds = 0, 0.0
        for index, prompt in enumerate(prompts):
            start = time.perf_counter()
            answer = autoregressive(target, prompt, args.n)
            seconds += time.perf_counter() - start
            tokens += len(answer) - len(prompt)
            check("torch plain", index, answer)
        return tokens, seconds, []

    def torch_dflash():
        tokens, seconds, all_rounds = 0, 0.0, []
        for index, prompt in enumerate(prompts):
            start = time.perf_counter()
            answer, rounds = dflash(target, drafter, prompt, args.n, stop_ids)
            seconds += time.perf_counter() - start
            tokens += len(answer) - len(prompt)
            all_rounds.append((sum(rounds), len(rounds)))
            check("torch dflash", index, answer, rounds)
        return tokens, seconds, all_rounds

    def ours_row(row, flags):
        answers = ours(args.ours, texts, args.n, flags)
        if len(answers) != len(prompts):
            sys.exit(f"{args.ours} printed {len(answers)} answers for {len(prompts)} prompts")
        for index, answer in enumerate(answers):
            check(row, index, prompts[index] + answer["tokens"])
        tokens = sum(len(answer["tokens"]) for answer in answers)
        seconds = sum(answer["seconds"]["prefill"] + answer["seconds"]["decode"] for answer in answers)
        all_rounds = [(sum(answer["accepted"]), answer["rounds"]) for answer in answers if not flags]
        return tokens, seconds, all_rounds

    rows = {"torch plain": torch_ar, "torch dflash": torch_dflash}
    if args.ours:
        rows["ours plain"] = lambda: ours_row("ours plain", ["--draft", "none"])
        rows["ours dflash"] = lambda: ours_row("ours dflash", [])

    autoregressive(target, prompts[0], 16)
    dflash(target, drafter, prompts[0], 16, stop_ids)
    results = {row: [] for row in rows}
    for _ in range(args.repeat):
        # Rows take turns, so that a slow minute of the machine affects every row.
        for row, measure in rows.items():
            results[row].append(measure())

    report = {}
    for row, runs in results.items():
        rates = [tokens / seconds for tokens, seconds, _ in runs]
        peer = "torch " + row.split()[1]
        rounds = [(verified, count) for verified, count in runs[0][2] if count > 0]
        report[row] = {
            "tokens": runs[0][0],
            "tokens_per_s": statistics.median(rates),
            "min": min(rates),
            "max": max(rates),
            "tau": sum(v for v, _ in rounds) / sum(c for _, c in rounds) if rounds else None,
            "mean_tau": statistics.mean(v / c for v, c in rounds) if rounds else None,
            "ratio_to_torch": statistics.median(rates) / report[peer]["tokens_per_s"] if peer in report else 1.0,
        }
    machine = {
        "cpu": processor(),
        "threads": args.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    settings = {"prompts": len(prompts), "new_tokens": args.n, "repeat": args.repeat, "temperature": 0}
    if args.json:
        print(json.dumps({"machine": machine, "settings": settings, "rows": report, "faults": faults}, indent=2))
    else:
        print(", ".join(f"{key} {value}" for key, value in {**machine, **settings}.items()))
        print(f"{'':14}{'tokens':>8}{'tok/s':>10}{'min':>10}{'max':>10}{'tau':>8}{'mean tau':>10}{'x torch':>9}")
        for row, r in report.items():
            tau, mean = ("" if r[key] is None else f"{r[key]:.3f}" for key in ("tau", "mean_tau"))
            print(
                f"{row:14}{r['tokens']:8}{r['tokens_per_s']:10.1f}{r['min']:10.1f}{r['max']:10.1f}"
                f"{tau:>8}{mean:>10}{r['ratio_to_torch']:9.2f}"
            )
        for fault in faults:
            print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["rounds"]:
        import baseline_rounds

        sys.exit(baseline_rounds.main(sys.argv[2:]))
    sys.exit(main())

"""Measures the rounds of `dflash-bench round` in PyTorch (`tools/baseline.py rounds`), to compare both on one machine.

    AR step       one row of each sequence through the target
    round         inject, draft, verify and accept together: features of a block's rows into the drafter's keys and
                  values, the drafter's pass over a block, the target's pass over that block, acceptance
    inject, draft, verify    the parts of a round, each alone

Linear layers are torch.nn.functional.linear (cuBLAS), with q, k and v in one matrix, and gate and up in another.
Attention is torch's SDPA without its math kernels. Of three ways to pass grouped heads and the mask, the script takes
the one that is fastest at the shape. On a GPU everything is captured as CUDA graphs. Weights, keys and values are
random bf16 (f32 on a CPU) with the shapes of benches/models/*.json. Positions are constants of the graph, which a real
engine cannot assume: this favours torch. RoPE scaling is omitted, which changes values but not times.

The AR step of Hugging Face Transformers, with the same shapes and a StaticCache, is measured too: eagerly, as a CUDA
graph, and with torch.compile; its rows have the parameter `library`. Variants that fail are named on stderr.

Times are from the GPU's clock (on a CPU, wall-clock). Every round of samples covers all rows, and the first round does
not count. `--json OUT` writes a record that follows benches/schema.json. With `--ours dflash-bench`, dflash-bench runs
the same grid between the rounds of samples. Its record is OUT with `-ours` in its name; compare the two with

    dflash-bench compare OUT OUT-ours

`--check dflash-gen` measures nothing: it decodes prompts with these rounds and the weights of the demo pair, in f32,
and compares tokens and accepted drafts with those of dflash-gen on the CPU; exit code 1 if they differ.
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from records import merged, numbers, quantile, rates, row, wholes

ROOT = Path(__file__).resolve().parent.parent
MODELS = ["qwen3-8b", "qwen3-4b", "llama-3.1-8b", "demo"]


def configs(model):
    """Names and configs of target and drafter, as dflash-bench names them."""
    if model == "demo":
        names = ("demo/target", "demo/drafter")
        files = [ROOT / name / "config.json" for name in names]
    else:
        names = (model, f"{model}-dflash")
        files = [ROOT / f"benches/models/{model}.{role}.json" for role in ("target", "drafter")]
    return names, [json.loads(file.read_text()) for file in files]


def random_weights(device, dtype):
    """A function from a name and a shape to a random tensor."""
    generator = torch.Generator(device).manual_seed(1)

    def weight(name, shape):
        if name.endswith("norm.weight") or name.endswith("layernorm.weight"):
            return torch.ones(shape, device=device, dtype=dtype)
        return torch.randn(shape, device=device, dtype=dtype, generator=generator) * 0.02

    return weight


def weights_of(folder):
    """A function from a name and a shape to a tensor of the folder, in f32."""
    from safetensors.torch import load_file

    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}

    def weight(name, shape):
        if tuple(tensors[name].shape) != tuple(shape):
            sys.exit(f"{folder}: {name} has the shape {tuple(tensors[name].shape)}, expected {tuple(shape)}")
        return tensors[name]

    return weight


class Stack:
    """The layers of a target or a drafter. Rows are x [batch, rows, hidden]."""

    def __init__(self, config, weight, prefix):
        self.hidden, self.eps = config["hidden_size"], config["rms_norm_eps"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim, self.theta = config["head_dim"], config["rope_theta"]
        q_size, inner, normed = self.heads * self.head_dim, config["intermediate_size"], config["model_type"] == "qwen3"
        kv_size = self.kv_heads * self.head_dim
        self.layers = []
        for i in range(config["num_hidden_layers"]):

            def get(name, *shape, at=f"{prefix}layers.{i}."):
                return weight(f"{at}{name}.weight", shape)

            self.layers.append({
                "before": get("input_layernorm", self.hidden),
                "qkv": torch.cat([
                    get("self_attn.q_proj", q_size, self.hidden),
                    get("self_attn.k_proj", kv_size, self.hidden),
                    get("self_attn.v_proj", kv_size, self.hidden),
                ]),
                "q_norm": get("self_attn.q_norm", self.head_dim) if normed else None,
                "k_norm": get("self_attn.k_norm", self.head_dim) if normed else None,
                "o": get("self_attn.o_proj", self.hidden, q_size),
                "after": get("post_attention_layernorm", self.hidden),
                "gate_up": torch.cat([
                    get("mlp.gate_proj", inner, self.hidden),
                    get("mlp.up_proj", inner, self.hidden),
                ]),
                "down": get("mlp.down_proj", self.hidden, inner),
            })
        self.last = weight(f"{prefix}norm.weight", (self.hidden,))

    def weight_bytes(self):
        return sum(w.nbytes for layer in self.layers for w in layer.values() if w is not None)

    def position_bytes(self):
        """Keys and values of one position of one sequence."""
        return 2 * len(self.layers) * self.kv_heads * self.head_dim * self.last.element_size()

    def cache(self, batch, positions):
        """Random keys and values of every layer: layers x [2, batch, kv_heads, positions, head_dim]."""
        shape = (2, batch, self.kv_heads, positions, self.head_dim)
        return [torch.randn(shape, device=self.last.device, dtype=self.last.dtype) for _ in self.layers]

    def angles(self, start, rows):
        """Cosines and sines of the positions from `start` on: each [rows, head_dim]."""
        device = self.last.device
        half = torch.arange(0, self.head_dim, 2, device=device).float() / self.head_dim
        angles = torch.outer(torch.arange(start, start + rows, device=device).float(), self.theta**-half).repeat(1, 2)
        return angles.cos().to(self.last.dtype), angles.sin().to(self.last.dtype)

    def norm(self, x, weight):
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def head_rows(self, x, heads):
        """[batch, rows, heads * head_dim] as [batch, heads, rows, head_dim]."""
        return x.unflatten(2, (heads, self.head_dim)).transpose(1, 2)

    def rotate(self, x, angles):
        first, second = x.chunk(2, dim=-1)
        return x * angles[0] + torch.cat((-second, first), dim=-1) * angles[1]

    def write_kv(self, layer, cache, keys, values, start, angles):
        """Writes keys and values [batch, rows, kv_heads * head_dim] of positions from `start` on."""
        keys, rows = self.head_rows(keys, self.kv_heads), slice(start, start + keys.shape[1])
        if layer["k_norm"] is not None:
            keys = self.norm(keys, layer["k_norm"])
        cache[0][:, :, rows] = self.rotate(keys, angles)
        cache[1][:, :, rows] = self.head_rows(values, self.kv_heads)

    def forward(self, x, caches, start, angles, attend, taps=()):
        """Final-normed rows at positions from `start` on, and the outputs of the tapped layers."""
        q_size, kv_size, tapped = self.heads * self.head_dim, self.kv_heads * self.head_dim, []
        for i, (layer, cache) in enumerate(zip(self.layers, caches)):
            rows = F.linear(self.norm(x, layer["before"]), layer["qkv"])
            queries, keys, values = rows.split((q_size, kv_size, kv_size), dim=2)
            self.write_kv(layer, cache, keys, values, start, angles)
            queries = self.head_rows(queries, self.heads)
            if layer["q_norm"] is not None:
                queries = self.norm(queries, layer["q_norm"])
            end = start + x.shape[1]
            attended = attend(self.rotate(queries, angles), cache[0][:, :, :end], cache[1][:, :, :end])
            x = x + F.linear(attended.transpose(1, 2).flatten(2), layer["o"])
            gate, up = F.linear(self.norm(x, layer["after"]), layer["gate_up"]).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer["down"])
            if i in taps:
                tapped.append(x)
        return self.norm(x, self.last), torch.cat(tapped, dim=-1) if tapped else None


def lower_right(rows, positions, device, dtype, copies=1):
    """A mask with -inf at hidden positions; the last row attends to everything. [copies * rows, positions]. Each row
    begins at a multiple of 16 bytes, as SDPA's kernels require."""
    padded = torch.full((rows, (positions + 7) // 8 * 8), -math.inf, device=device, dtype=dtype)
    return padded.triu(positions - rows + 1).repeat(copies, 1)[:, :positions]


def attentions(stack, rows, positions, causal):
    """Attention functions by name, of queries, keys and values [batch, heads, rows, head_dim]. They treat grouped heads
    differently: SDPA's own support; groups folded into rows, so that keys and values are read once; keys and values
    copied for each query head."""
    group, masked = stack.heads // stack.kv_heads, causal and rows > 1
    masks = [
        lower_right(rows, positions, stack.last.device, stack.last.dtype, copies) if masked else None
        for copies in (1, group)
    ]

    def by_sdpa(queries, keys, values):
        bias = causal_lower_right(rows, positions) if masked else None
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, enable_gqa=True)

    def folded(queries, keys, values):
        batch, _, _, head_dim = queries.shape
        queries = queries.reshape(batch, stack.kv_heads, group * rows, head_dim)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=masks[1])
        return out.reshape(batch, stack.heads, rows, head_dim)

    def copied(queries, keys, values):
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=masks[0])

    return {"by SDPA": by_sdpa, "folded": folded, "copied": copied}


class Pair:
    """Target and drafter. The parts of a round are functions of tensors and of the position of their first row."""

    def __init__(self, model, weights, device):
        self.names, (config, own) = configs(model)
        target_weight, drafter_weight = weights
        self.device, self.config, self.vocabulary = device, config, config["vocab_size"]
        self.target = Stack(config, target_weight, "model.")
        self.drafter = Stack(own, drafter_weight, "")
        hidden = self.target.hidden
        self.embedding = target_weight("model.embed_tokens.weight", (self.vocabulary, hidden))
        tied = config.get("tie_word_embeddings", False)
        self.head = self.embedding if tied else target_weight("lm_head.weight", (self.vocabulary, hidden))
        self.taps = own["dflash_config"]["target_layer_ids"]
        self.mask, self.block = own["dflash_config"]["mask_token_id"], own["block_size"]
        self.fc = drafter_weight("fc.weight", (hidden, len(self.taps) * hidden))
        self.hidden_norm = drafter_weight("hidden_norm.weight", (hidden,))

    def best(self, x):
        return F.linear(x, self.head).argmax(-1)

    def inject(self, features):
        """Context features of tapped features [batch, rows, taps * hidden] (docs/dflash.md 3.2)."""
        return self.drafter.norm(F.linear(features, self.fc), self.hidden_norm)

    def write_context_kv(self, context, caches, start, angles):
        """Writes the drafter's keys and values of context features: part of the draft, as in dflash-bench."""
        q_size = self.drafter.heads * self.drafter.head_dim
        for layer, cache in zip(self.drafter.layers, caches):
            keys, values = F.linear(context, layer["qkv"][q_size:]).chunk(2, dim=-1)
            self.drafter.write_kv(layer, cache, keys, values, start, angles)

    def draft(self, anchors, caches, start, angles, attend):
        """Drafts [batch, block - 1] after the anchors [batch] at position `start`."""
        masks = anchors.new_full((len(anchors), self.block - 1), self.mask)
        x = self.embedding[torch.cat((anchors[:, None], masks), dim=1)]
        return self.best(self.drafter.forward(x, caches, start, angles, attend)[0][:, 1:])

    def verify(self, tokens, caches, start, angles, attend):
        """The target's best token after each of the tokens [batch, rows], and their features."""
        x, features = self.target.forward(self.embedding[tokens], caches, start, angles, attend, self.taps)
        return self.best(x), features

    def accept(self, drafts, best):
        """The number of tokens that each sequence emits, and the last of them: each [batch]."""
        accepted = (drafts == best[:, :-1]).int().cumprod(1).sum(1)
        return accepted + 1, best.gather(1, accepted[:, None])[:, 0]


class Machine:
    """Runs and times functions on a device."""

    def __init__(self, device):
        self.device, self.cuda = device, device == "cuda"

    def prepared(self, run, prepare=lambda: None):
        """A function that does what `run` does and can be called repeatedly, each time after `prepare`; on a GPU it
        replays a captured graph."""
        if not self.cuda:
            return run
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                prepare()
                run()
        torch.cuda.current_stream().wait_stream(stream)
        prepare()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = run()
        return lambda: (graph.replay(), kept)

    def sample(self, run, prepare=lambda: None, captured=True):
        """Milliseconds of `run`. captured: it replays a graph; otherwise it launches kernels one by one."""
        if not self.cuda:
            prepare()
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if captured:
            # As in dflash-bench: keeps the GPU busy while the sample is enqueued, to exclude launch latency.
            run()
        prepare()
        if not captured:
            # Preparation must not make the GPU wait for the host between the two events.
            torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def fastest(self, stack, batch, rows, positions, causal):
        """The fastest correct attention at this shape, and its name."""
        device, dtype = stack.last.device, stack.last.dtype
        queries = torch.randn(batch, stack.heads, rows, stack.head_dim, device=device, dtype=dtype)
        shape = (2, batch, stack.kv_heads, positions, stack.head_dim)
        keys, values = torch.randn(shape, device=device, dtype=dtype)
        group = stack.heads // stack.kv_heads
        scores = queries.float() @ keys.float().repeat_interleave(group, 1).mT / math.sqrt(stack.head_dim)
        if causal:
            scores += lower_right(rows, positions, device, torch.float32)
        expected = scores.softmax(-1) @ values.float().repeat_interleave(group, 1)
        found = {}
        for name, attend in attentions(stack, rows, positions, causal).items():
            try:
                if (attend(queries, keys, values).float() - expected).abs().max() > 0.02:
                    continue
                run = self.prepared(lambda attend=attend: [attend(queries, keys, values) for _ in range(10)])
                found[name] = (min(self.sample(run) for _ in range(5)), attend)
            except (RuntimeError, ValueError):
                continue  # These kernels do not support it, or not at this shape.
        if not found:
            sys.exit(f"no kernel of torch's SDPA is correct for {rows} rows at {positions} positions on this device")
        name = min(found, key=lambda name: found[name][0])
        return found[name][1], name


def torch_rows(pair, machine, context, batch):
    """Rows for one context and batch: name, parameters, function, preparation, bytes that it must read."""
    target, drafter, block, device = pair.target, pair.drafter, pair.block, pair.device
    caches, own = target.cache(batch, context + block), drafter.cache(batch, context + block)
    anchors = torch.randint(pair.vocabulary, (batch,), device=device)
    tokens = torch.randint(pair.vocabulary, (batch, block), device=device)
    features = torch.randn(batch, block, len(pair.taps) * target.hidden, device=device, dtype=target.last.dtype)
    injected = max(0, context - block)
    step_angles, verify_angles = target.angles(context, 1), target.angles(context, block)
    draft_angles, inject_angles = drafter.angles(context, block), drafter.angles(injected, block)
    ways = {}

    def fastest(what, stack, rows, causal):
        attend, ways[what] = machine.fastest(stack, batch, rows, context + rows, causal)
        return attend

    attend_step = fastest("AR step", target, 1, True)
    attend_draft, attend_verify = fastest("draft", drafter, block, False), fastest("verify", target, block, True)
    print(f"context {context}, batch {batch}: attention {ways}", file=sys.stderr)

    def step():
        return pair.verify(anchors[:, None], caches, context, step_angles, attend_step)

    context_features = pair.inject(features)

    def inject():
        return pair.inject(features)

    def draft(context_features=context_features):
        pair.write_context_kv(context_features, own, injected, inject_angles)
        return pair.draft(anchors, own, context, draft_angles, attend_draft)

    def verify(tokens=tokens):
        return pair.verify(tokens, caches, context, verify_angles, attend_verify)

    def full_round():
        drafts = draft(inject())
        best, after = verify(torch.cat((anchors[:, None], drafts), dim=1))
        return pair.accept(drafts, best), after

    def nothing():
        pass

    at = {"context": context, "batch": batch}
    in_round = {**at, "block": block}
    held = batch * (context + 1)
    step_bytes = target.weight_bytes() + pair.head.nbytes + held * target.position_bytes()
    draft_bytes = drafter.weight_bytes() + pair.head.nbytes + held * drafter.position_bytes()
    inject_bytes = pair.fc.nbytes
    return [
        ("AR step", at, machine.prepared(step), nothing, step_bytes),
        ("round", in_round, machine.prepared(full_round), nothing, step_bytes + draft_bytes + inject_bytes),
        ("inject", in_round, machine.prepared(inject), nothing, inject_bytes),
        ("draft", in_round, machine.prepared(draft), nothing, draft_bytes),
        ("verify", in_round, machine.prepared(verify), nothing, step_bytes),
    ]


def library_rows(config, machine, dtype, grid, step_bytes):
    """Rows of Transformers' AR step for every context and batch: eager, as a graph, and compiled."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

    transformers.logging.set_verbosity_error()
    kind = config["model_type"]
    known = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    with torch.device(machine.device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **known), dtype=dtype).eval()
    compiled = torch.compile(model.forward, dynamic=False) if machine.cuda else None
    rows = []
    for context, batch in grid:
        cache = StaticCache(config=model.config, max_cache_len=context + 1)
        ids = torch.randint(config["vocab_size"], (batch, 1), device=machine.device)
        if context:
            prompt = torch.randint(config["vocab_size"], (batch, context), device=machine.device)
            model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)

        def rewind(cache=cache, context=context):
            for layer in cache.layers:
                if layer.is_initialized:
                    layer.cumulative_length.fill_(context)

        def stepping(forward, cache=cache, ids=ids):
            # With the argmax, so that the work on the logits is included.
            return lambda: forward(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)

        ways = {"transformers": lambda rewind: stepping(model)}
        if machine.cuda:
            ways["transformers, graph"] = lambda rewind: machine.prepared(stepping(model), rewind)
            ways["transformers, compiled"] = lambda rewind: machine.prepared(stepping(compiled), rewind)
        for name, made in ways.items():
            try:
                run = made(rewind)
                rewind()
                run()
            except Exception as error:  # A library of this size may raise anything; keep the other rows.
                reason = (str(error).splitlines() or [""])[0][:200]
                print(f"{name}: left out: {type(error).__name__}: {reason}", file=sys.stderr)
                continue
            parameters = {"context": context, "batch": batch, "library": name}
            rows.append(("AR step", parameters, run, rewind, step_bytes(context, batch)))
    return rows


def ours(binary, args, lists):
    """Runs dflash-bench with one round of samples over the same grid; returns its record."""
    command = [binary, "round", "--model", args.model, "--rounds", "1", "--samples", str(args.samples), "--json"]
    command += ["--device", "cuda" if args.device == "cuda" else "cpu"]
    for flag in ("batch", "context", "acceptance"):
        if lists[flag]:
            command += [f"--{flag}", ",".join(f"{n:g}" for n in lists[flag])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} exited with {done.returncode}")
    return json.loads(done.stdout)


def record(args, names, rows):
    versions = [f"torch {torch.__version__}"]
    if "transformers" in sys.modules:
        versions.append(f"transformers {sys.modules['transformers'].__version__}")
    machine = dict.fromkeys(("device", "card", "driver", "gigabytes_per_s", "tflops", "memory_gigabytes"))
    machine["device"] = args.device
    if args.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        machine |= {
            "card": card.name, "memory_gigabytes": card.total_memory / 1e9, "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
        }
    return {
        "schema": "dflash-bench/1", "command": "round", "arguments": sys.argv[1:],
        "build": {"version": ", ".join(versions), "commit": None, "features": [], "ptx": []},
        "machine": machine, "model": dict(zip(("target", "drafter"), names)), "rows": rows,
    }


def check(binary, count, new_tokens):
    """Decodes held-out prompts with these rounds and compares with dflash-gen. True if all are equal."""
    from transformers import AutoTokenizer

    pair = Pair("demo", (weights_of(ROOT / "demo/target"), weights_of(ROOT / "demo/drafter")), "cpu")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo/target")
    lines = (ROOT / "tests/data/prompts.jsonl").read_text().splitlines()[:count]
    texts = [json.loads(line)["prompt"] for line in lines]
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.writelines(json.dumps({"prompt": text}) + "\n" for text in texts)
        file.flush()
        command = [binary, "--device", "cpu", "--prompts", file.name, "-n", str(new_tokens), "--json", "--quiet"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} exited with {done.returncode}")
    equal = True
    for number, (text, line) in enumerate(zip(texts, done.stdout.splitlines(), strict=True), 1):
        tokens, accepted = decode(pair, tokenizer(text)["input_ids"], new_tokens)
        theirs = json.loads(line)
        same = tokens == theirs["tokens"] and accepted == theirs["accepted"]
        equal &= same
        print(f"prompt {number}: {len(tokens)} tokens in {len(accepted)} rounds: {'equal' if same else 'NOT EQUAL'}")
    return equal


def decode(pair, prompt, new_tokens):
    """Greedy tokens of one prompt and the tokens of each round, as dflash-gen counts them."""
    stop, positions = pair.config["eos_token_id"], len(prompt) + new_tokens + pair.block
    caches, own = pair.target.cache(1, positions), pair.drafter.cache(1, positions)

    def causal(stack, rows, start):
        return attentions(stack, rows, start + rows, True)["copied"]

    rows = len(prompt)
    best, features = pair.verify(
        torch.tensor([prompt]), caches, 0, pair.target.angles(0, rows), causal(pair.target, rows, 0)
    )
    tokens, accepted, injected = [best[0, -1].item()], [], 0
    while len(tokens) < new_tokens and tokens[-1] != stop:
        start = len(prompt) + len(tokens) - 1
        angles = pair.drafter.angles(injected, features.shape[1])
        pair.write_context_kv(pair.inject(features), own, injected, angles)
        injected += features.shape[1]
        block = attentions(pair.drafter, pair.block, start + pair.block, False)["folded"]
        anchors = torch.tensor([tokens[-1]])
        drafts = pair.draft(anchors, own, start, pair.drafter.angles(start, pair.block), block)
        ids = torch.cat((anchors[:, None], drafts), dim=1)
        angles = pair.target.angles(start, pair.block)
        best, features = pair.verify(ids, caches, start, angles, causal(pair.target, pair.block, start))
        (count,), (last,) = pair.accept(drafts, best)
        count = count.item()
        features = features[:, :count]
        accepted.append(count)
        new = drafts[0, : count - 1].tolist() + [last.item()]
        new = new[: new.index(stop) + 1] if stop in new else new
        tokens += new[: new_tokens - len(tokens)]
    return tokens, accepted


def table(rows):
    print(f"{'':30}{'context':>9}{'batch':>7}{'median':>11}{'p10':>11}{'p90':>11}  unit      GB/s")
    for row in rows:
        at, rate = row["parameters"], row["numbers"].get("GB/s")
        name = at.get("library", row["name"]) + (f" {at['acceptance']:g}" if "acceptance" in at else "")
        values = "".join(f"{row[key]:11.4g}" for key in ("median", "p10", "p90"))
        print(f"{name:30}{at['context']:9}{at['batch']:7}{values}  {row['unit']:6}" + (f"{rate:8.1f}" if rate else ""))


def main(arguments):
    parser = argparse.ArgumentParser(
        prog="baseline.py rounds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="qwen3-8b")
    parser.add_argument("--batch", type=wholes, default=[1], metavar="LIST", help="sequences that run together (1)")
    parser.add_argument("--context", type=wholes, default=[1024], metavar="LIST", help="positions of each (1024)")
    parser.add_argument("--acceptance", type=numbers, default=[], metavar="LIST", help="tokens per round to assume")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of samples (5)")
    parser.add_argument("--samples", type=int, default=20, help="samples of a row in a round (20)")
    parser.add_argument("--without-transformers", action="store_true", help="leave out the rows of Transformers")
    parser.add_argument("--ours", metavar="PATH", help="dflash-bench, to run between the rounds of samples")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the record to OUT")
    parser.add_argument("--check", metavar="PATH", help="dflash-gen: compare tokens with it, measure nothing")
    parser.add_argument("--count", type=int, default=4, help="with --check: prompts (4)")
    args = parser.parse_args(arguments)
    if min(args.rounds, args.samples, args.count) < 1:
        parser.error("--rounds, --samples and --count must be at least 1")
    if args.ours and not args.json:
        parser.error("--ours needs --json OUT: its record is written next to OUT")
    torch.set_grad_enabled(False)
    if args.check:
        return 0 if check(args.check, args.count, 64) else 1
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device is cuda, but torch finds no GPU: expected a GPU, or --device cpu")

    machine = Machine(args.device)
    dtype = torch.bfloat16 if machine.cuda else torch.float32
    weights = random_weights(args.device, dtype)
    pair = Pair(args.model, (weights, weights), args.device)
    most = min(pair.config["max_position_embeddings"], 2**31) - pair.block
    for n in args.context:
        if not pair.block <= n <= most:
            parser.error(f"--context has {n}, expected {pair.block} to {most}")
    for n in args.acceptance:
        if not 1 <= n <= pair.block:
            parser.error(f"--acceptance has {n}, expected 1 to {pair.block}")
    grid = [(context, batch) for context in dict.fromkeys(args.context) for batch in dict.fromkeys(args.batch)]
    lists = {"batch": args.batch, "context": args.context, "acceptance": args.acceptance}
    fast = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION])
    with fast if machine.cuda else contextlib.nullcontext():
        measured = [row for place in grid for row in torch_rows(pair, machine, *place)]
    bytes_of = {(row[1]["context"], row[1]["batch"]): row[4] for row in measured if row[0] == "AR step"}
    if not args.without_transformers:
        measured += library_rows(pair.config, machine, dtype, grid, lambda *place: bytes_of[place])

    taken, theirs = [[] for _ in measured], []
    for turn in range(args.rounds + 1):
        for samples, (_, parameters, run, prepare, _) in zip(taken, measured):
            captured = parameters.get("library") != "transformers"
            new = [machine.sample(run, prepare, captured) for _ in range(args.samples)]
            # The first round warms caches and clocks.
            samples += new if turn else []
        if args.ours and turn:
            theirs.append(ours(args.ours, args, lists))
    rows = []
    for samples, (name, parameters, _, _, read) in zip(taken, measured):
        speed = read / quantile(samples, 0.5) / 1e6
        rounds = [args.samples] * args.rounds
        rows.append(row(name, parameters, samples, rounds, numbers={"GB": read / 1e9, "GB/s": speed}))
    rows += rates(rows, args.acceptance)
    table(rows)
    if args.json:
        args.json.write_text(json.dumps(record(args, pair.names, rows)) + "\n")
    if theirs:
        beside = args.json.with_name(f"{args.json.stem}-ours{args.json.suffix}")
        beside.write_text(json.dumps(merged(theirs)) + "\n")
        print(f"dflash-bench's record: {beside}; {args.ours} compare {args.json} {beside}", file=sys.stderr)
    return 0

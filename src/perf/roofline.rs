//! The least time that the passes of a pair can take on a card: every weight and every key and value of the context
//! crosses the memory bus once, every product goes through the tensor cores, and the slower of the two decides. All of
//! it is arithmetic on configs; activations, norms and embeddings, about a thousandth, are left out.

use crate::checkpoint::config::{DrafterConfig, Stack, TargetConfig};

/// bf16
const ELEMENT: f64 = 2.0;

/// What a card can do at most, as its vendor says. What a kernel reaches is less: reading alone about 90 %.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Card {
    pub name: &'static str,
    /// GB/s (10^9)
    pub bandwidth: f64,
    /// dense bf16 with f32 sums, TFLOP/s
    pub tflops: f64,
    /// GB (10^9)
    pub memory: f64,
}

const fn card(name: &'static str, bandwidth: f64, tflops: f64, memory: f64) -> Card {
    Card { name, bandwidth, tflops, memory }
}

/// Nominal figures of the vendor's data sheets, without sparsity.
pub const CARDS: [Card; 12] = [
    card("H200", 4800.0, 989.0, 141.0),
    card("H100-SXM", 3350.0, 989.0, 80.0),
    card("H100-PCIe", 2000.0, 756.0, 80.0),
    card("GH200", 4000.0, 989.0, 96.0),
    card("B200", 8000.0, 2250.0, 180.0),
    card("A100-80GB", 2039.0, 312.0, 80.0),
    card("A100-40GB", 1555.0, 312.0, 40.0),
    card("L40S", 864.0, 362.0, 48.0),
    card("L4", 300.0, 121.0, 24.0),
    card("RTX-5090", 1792.0, 209.5, 32.0),
    card("RTX-4090", 1008.0, 165.2, 24.0),
    card("RTX-3090", 936.0, 71.0, 24.0),
];

impl Card {
    /// By name, in any case and with or without its hyphens and spaces.
    pub fn named(name: &str) -> Option<Card> {
        let plain = |name: &str| name.replace(['-', ' '], "").to_lowercase();
        CARDS.into_iter().find(|card| plain(card.name) == plain(name))
    }

    /// By what the driver calls it: `NVIDIA H200`, `NVIDIA A100-SXM4-80GB`, `NVIDIA GeForce RTX 4090`. None where it is
    /// not surely one of [`CARDS`].
    pub fn of_driver(name: &str) -> Option<Card> {
        let words: Vec<&str> =
            name.split([' ', '-']).filter(|word| !["NVIDIA", "GeForce"].contains(word)).collect();
        let has = |word: &str| words.contains(&word);
        let found = match *words.first()? {
            "H100" if has("PCIe") => "H100-PCIe",
            "H100" if has("HBM3") => "H100-SXM",
            // The PCIe card of that size has slower memory.
            "A100" if has("80GB") && !has("PCIe") => "A100-80GB",
            "A100" if has("40GB") => "A100-40GB",
            // A 4090 D or Laptop GPU is another card.
            "RTX" if words.len() == 2 => return Card::named(&words.concat()),
            "H200" if has("NVL") => return None,
            "H100" | "A100" | "RTX" => return None,
            other => other,
        };
        Card::named(found)
    }
}

/// What a pass must move and compute. Numbers are f64 because configs may be absurd; real ones are exact in it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pass {
    /// bytes from and to memory
    pub bytes: f64,
    /// floating point operations, two for each product that is added
    pub flops: f64,
}

impl Pass {
    /// The least time it can take, in milliseconds.
    pub fn ms(&self, card: &Card) -> f64 {
        self.memory_ms(card).max(self.flops / (card.tflops * 1e9))
    }

    fn memory_ms(&self, card: &Card) -> f64 {
        self.bytes / (card.bandwidth * 1e6)
    }

    /// Whether it waits for memory, and not for the tensor cores.
    pub fn is_bound_by_memory(&self, card: &Card) -> bool {
        self.memory_ms(card) >= self.ms(card)
    }
}

/// Bytes of a layer's matrices: query, key and value together; output; gate and up together; down.
pub fn layer_bytes(stack: &Stack) -> [(&'static str, f64); 4] {
    let [h, ff, q, kv] = sizes(stack);
    [
        ("qkv", (q + 2.0 * kv) * h * ELEMENT),
        ("o", h * q * ELEMENT),
        ("gate_up", 2.0 * ff * h * ELEMENT),
        ("down", h * ff * ELEMENT),
    ]
}

/// hidden, intermediate, and widths of all queries and of all keys
fn sizes(s: &Stack) -> [f64; 4] {
    [s.hidden, s.intermediate, s.heads * s.head_dim, s.kv_heads * s.head_dim].map(|n| n as f64)
}

fn layers_bytes(stack: &Stack) -> f64 {
    let layer: f64 = layer_bytes(stack).iter().map(|part| part.1).sum();
    stack.attention.len() as f64 * layer
}

/// Bytes of the matrix that makes logits, which may be the embedding table.
pub fn head_bytes(target: &TargetConfig) -> f64 {
    target.vocab as f64 * target.stack.hidden as f64 * ELEMENT
}

/// Bytes of the matrix that joins the tapped features.
pub fn fc_bytes(drafter: &DrafterConfig) -> f64 {
    drafter.taps.len() as f64 * (drafter.stack.hidden as f64).powi(2) * ELEMENT
}

/// Bytes of weights that a pass of the target reads: its layers and its head.
pub fn target_bytes(target: &TargetConfig) -> f64 {
    layers_bytes(&target.stack) + head_bytes(target)
}

/// Bytes of weights that a pass of the drafter reads: its layers, the join of features, and the target's head.
pub fn drafter_bytes(target: &TargetConfig, drafter: &DrafterConfig) -> f64 {
    layers_bytes(&drafter.stack) + fc_bytes(drafter) + head_bytes(target)
}

/// Bytes of keys and values of one position in one layer.
fn kv_bytes(stack: &Stack) -> f64 {
    2.0 * sizes(stack)[3] * ELEMENT
}

/// Positions of a context that each layer reads: all, or its window; all layers together.
fn positions_read(stack: &Stack, context: usize) -> f64 {
    stack.attention.iter().map(|layer| layer.window.map_or(context, |w| w.min(context)) as f64).sum()
}

/// Operations of attention for `rows` rows of a sequence, each over the context and the rows of the pass.
fn attention_flops(stack: &Stack, context: usize, rows: usize) -> f64 {
    let keys = positions_read(stack, context) + (stack.attention.len() * rows) as f64;
    4.0 * sizes(stack)[2] * rows as f64 * keys
}

/// A pass of the target over `rows` rows of each of `batch` sequences that have `context` positions: a AR step (1 row),
/// the verification of a block, or of a tree with that many nodes.
pub fn target_pass(target: &TargetConfig, context: usize, batch: usize, rows: usize) -> Pass {
    let stack = &target.stack;
    let weights = target_bytes(target);
    let (sequences, all) = (batch as f64, (batch * rows) as f64);
    let written = all * stack.attention.len() as f64;
    Pass {
        bytes: weights + (sequences * positions_read(stack, context) + written) * kv_bytes(stack),
        flops: weights / ELEMENT * 2.0 * all + sequences * attention_flops(stack, context, rows),
    }
}

/// A pass of the drafter: `block` rows of each sequence, and keys and values of as many rows of features, which is what a
/// captured round always computes.
pub fn draft_pass(
    target: &TargetConfig,
    drafter: &DrafterConfig,
    context: usize,
    batch: usize,
    block: usize,
) -> Pass {
    let stack = &drafter.stack;
    let [h, _, _, kv] = sizes(stack);
    let (sequences, all) = (batch as f64, (batch * block) as f64);
    let layers = stack.attention.len() as f64;
    let block_weights = layers_bytes(stack) + head_bytes(target);
    let feature_weights = fc_bytes(drafter) + layers * 2.0 * kv * h * ELEMENT;
    let moved = sequences * positions_read(stack, context) + all * layers;
    Pass {
        bytes: drafter_bytes(target, drafter) + moved * kv_bytes(stack),
        flops: (block_weights + feature_weights) / ELEMENT * 2.0 * all
            + sequences * attention_flops(stack, context, block),
    }
}

//! Roofline model: the minimum time of a pass of the target or the drafter on a card, computed from the
//! configs. Every weight and every key and value of the context is read from memory once, and every product
//! runs on the tensor cores. The slower of the two limits the pass. Activations, norms and embeddings are
//! left out; they are about a thousandth.

use crate::checkpoint::config::{DrafterConfig, Stack, TargetConfig};

/// Bytes of a bf16.
const ELEMENT: f64 = 2.0;

/// Nominal limits of a card, from its vendor. Kernels reach less: a kernel that only reads reaches about 90 %
/// of the bandwidth.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Card {
    /// Its short name, such as `H100-SXM`.
    pub name: &'static str,
    /// Memory bandwidth in GB/s (10^9 bytes).
    pub bandwidth: f64,
    /// Dense bf16 with f32 accumulation, in TFLOP/s.
    pub tflops: f64,
    /// Memory in GB (10^9 bytes).
    pub memory: f64,
}

const fn card(name: &'static str, bandwidth: f64, tflops: f64, memory: f64) -> Card {
    Card { name, bandwidth, tflops, memory }
}

/// Known cards, with the figures of the vendor's data sheets, without sparsity.
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
    /// The card with that name in [`CARDS`]. Case, hyphens and spaces do not matter.
    pub fn named(name: &str) -> Option<Card> {
        let normal = |name: &str| name.replace(['-', ' '], "").to_lowercase();
        CARDS.into_iter().find(|card| normal(card.name) == normal(name))
    }

    /// The card with that name in the driver: `NVIDIA H200`, `NVIDIA A100-SXM4-80GB`, `NVIDIA GeForce RTX
    /// 4090`. `None` if the name does not identify one of [`CARDS`].
    pub fn of_driver(name: &str) -> Option<Card> {
        let words: Vec<&str> =
            name.split([' ', '-']).filter(|word| !["NVIDIA", "GeForce"].contains(word)).collect();
        let has = |word: &str| words.contains(&word);
        let found = match *words.first()? {
            "H100" if has("PCIe") => "H100-PCIe",
            "H100" if has("HBM3") => "H100-SXM",
            // The PCIe card with 80 GB has slower memory.
            "A100" if has("80GB") && !has("PCIe") => "A100-80GB",
            "A100" if has("40GB") => "A100-40GB",
            // A name with more words (4090 D, Laptop GPU) is another card.
            "RTX" if words.len() == 2 => return Card::named(&words.concat()),
            "H200" if has("NVL") => return None,
            // The 144 GB variant has faster memory.
            "GH200" if has("HBM3e") => return None,
            "H100" | "A100" | "RTX" => return None,
            other => other,
        };
        Card::named(found)
    }
}

/// The work of a pass, in f64: exact for real configs, and no overflow for absurd ones.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pass {
    /// Bytes read from and written to memory.
    pub bytes: f64,
    /// Floating point operations, two for each multiply-add.
    pub flops: f64,
}

impl Pass {
    /// The minimum time of the pass, in milliseconds.
    pub fn ms(&self, card: &Card) -> f64 {
        self.memory_ms(card).max(self.flops / (card.tflops * 1e9))
    }

    fn memory_ms(&self, card: &Card) -> f64 {
        self.bytes / (card.bandwidth * 1e6)
    }

    /// Whether memory bandwidth limits the pass, not the tensor cores.
    pub fn is_bound_by_memory(&self, card: &Card) -> bool {
        self.memory_ms(card) >= self.ms(card)
    }
}

/// (name, bytes) of the matrices of a layer with attention and a dense MLP, as the kernels read them: q, k
/// and v together; output; gate and up together; down.
pub fn layer_bytes(stack: &Stack) -> [(&'static str, f64); 4] {
    let [h, ff, q, kv] = sizes(stack);
    [
        ("qkv", (q + 2.0 * kv) * h * ELEMENT),
        ("o", h * q * ELEMENT),
        ("gate_up", 2.0 * ff * h * ELEMENT),
        ("down", h * ff * ELEMENT),
    ]
}

/// Hidden size, intermediate size, width of all query heads and of all key heads.
fn sizes(s: &Stack) -> [f64; 4] {
    [s.hidden, s.intermediate, s.heads * s.head_dim, s.kv_heads * s.head_dim].map(|n| n as f64)
}

/// Bytes of the layers' matrices that a pass of `rows` rows reads. A mixture of experts reads the experts
/// that the rows choose: as many different ones as if each row chose at random.
fn layers_bytes(stack: &Stack, rows: usize) -> f64 {
    let [qkv, o, gate_up, down] = layer_bytes(stack).map(|part| part.1);
    let output_gate = (stack.query_rows() - stack.heads * stack.head_dim) as f64 * sizes(stack)[0] * ELEMENT;
    let delta_net =
        stack.delta_net.as_ref().map_or(0.0, |shape| shape.matrices(stack.hidden) as f64 * ELEMENT);
    let mlp = stack.moe.as_ref().map_or(gate_up + down, |moe| {
        let (experts, chosen) = (moe.experts as f64, moe.chosen as f64);
        let read = experts * (1.0 - (1.0 - chosen / experts).powf(rows as f64));
        moe.matrices(stack.hidden, read) * ELEMENT
    });
    let recurrent = stack.delta_net_layers() as f64;
    let layers = stack.attention.len() as f64;
    (layers - recurrent) * (qkv + output_gate + o) + recurrent * delta_net + layers * mlp
}

/// Bytes of the output head's matrix, which may be the embedding table.
pub fn head_bytes(target: &TargetConfig) -> f64 {
    target.vocab as f64 * target.stack.hidden as f64 * ELEMENT
}

/// Bytes of the head that the drafter uses: the target's, or its own.
fn draft_head_bytes(target: &TargetConfig, drafter: &DrafterConfig) -> f64 {
    drafter.own_head.map_or(head_bytes(target), |rows| (rows * drafter.stack.hidden) as f64 * ELEMENT)
}

/// Bytes of the drafter's `fc` matrix, which projects the tapped features.
pub fn fc_bytes(drafter: &DrafterConfig) -> f64 {
    drafter.taps.len() as f64 * (drafter.stack.hidden as f64).powi(2) * ELEMENT
}

/// Bytes of weights that a pass of the target over `rows` rows reads: its layers and its head.
pub fn target_bytes(target: &TargetConfig, rows: usize) -> f64 {
    layers_bytes(&target.stack, rows) + head_bytes(target)
}

/// Bytes of the head of a walk, which every draft of a round reads.
fn walk_bytes(drafter: &DrafterConfig) -> f64 {
    let outputs = drafter.own_head.unwrap_or(drafter.vocab);
    drafter.walk().map_or(0.0, |walk| ((drafter.block - 1) * outputs * walk.rank) as f64 * ELEMENT)
}

/// Bytes of the projections of its convolutions and of its candidate selector. A round reads few rows of the
/// selector's codebooks.
fn projection_bytes(drafter: &DrafterConfig) -> f64 {
    let (hidden, layers) = (drafter.stack.hidden, drafter.stack.attention.len() as f64);
    let size = |shape: &[usize]| shape.iter().product::<usize>() as f64 * ELEMENT;
    let convolution = drafter.convolution.map_or(0.0, |plan| size(&plan.tensors("", hidden)[1].1));
    let selector = drafter.selector().map_or(0.0, |plan| size(&plan.tensors(hidden, drafter.vocab)[0].1));
    2.0 * layers * convolution + selector
}

/// Bytes of weights that a step of a chain reads: its layer, whose q, k and v have twice as many columns as
/// those of other layers, and the head.
fn chain_step_bytes(target: &TargetConfig, drafter: &DrafterConfig) -> f64 {
    let [h, _, q, kv] = sizes(&drafter.stack);
    layers_bytes(&drafter.stack, 1) + (q + 2.0 * kv) * h * ELEMENT + draft_head_bytes(target, drafter)
}

/// Bytes of weights that the drafter reads for a round. A block takes one pass: its layers, its `fc` matrix,
/// the head, the head of a walk, and the projections of convolutions and of a selector. A chain takes a step
/// for each draft.
pub fn drafter_bytes(target: &TargetConfig, drafter: &DrafterConfig) -> f64 {
    if drafter.chain().is_some() {
        return fc_bytes(drafter) + (drafter.block - 1) as f64 * chain_step_bytes(target, drafter);
    }
    let heads = draft_head_bytes(target, drafter) + walk_bytes(drafter);
    layers_bytes(&drafter.stack, 1) + fc_bytes(drafter) + heads + projection_bytes(drafter)
}

/// Bytes of keys and values of one position in one layer.
fn kv_bytes(stack: &Stack) -> f64 {
    2.0 * sizes(stack)[3] * ELEMENT
}

/// Number of layers that are attention.
fn attention_layers(stack: &Stack) -> f64 {
    (stack.attention.len() - stack.delta_net_layers()) as f64
}

/// Sum over layers of the context positions that each reads: all, or those in its window.
fn positions_read(stack: &Stack, context: usize) -> f64 {
    let attention = stack.attention.iter().enumerate().filter(|(i, _)| stack.delta_net(*i).is_none());
    attention.map(|(_, layer)| layer.window.map_or(context, |w| w.min(context)) as f64).sum()
}

/// Floating point operations of attention for `rows` rows of a sequence. Each row attends to the context and
/// to the rows of the pass.
fn attention_flops(stack: &Stack, context: usize, rows: usize) -> f64 {
    let keys = positions_read(stack, context) + attention_layers(stack) * rows as f64;
    4.0 * sizes(stack)[2] * rows as f64 * keys
}

/// Elements of all recurrent states of a sequence. A pass reads and writes each once, as f32, and computes
/// three multiply-adds and a product for each element and row.
fn state_elements(stack: &Stack) -> f64 {
    let state = stack.delta_net.as_ref().map_or(0, |shape| shape.state());
    (stack.delta_net_layers() * state) as f64
}

/// A pass of the target over `rows` rows of each of `batch` sequences that have `context` positions: an AR
/// step (1 row), or the verification of a chain or a tree with that many rows.
pub fn target_pass(target: &TargetConfig, context: usize, batch: usize, rows: usize) -> Pass {
    let stack = &target.stack;
    let (sequences, all) = (batch as f64, (batch * rows) as f64);
    let kv = (sequences * positions_read(stack, context) + all * attention_layers(stack)) * kv_bytes(stack);
    let states = state_elements(stack);
    Pass {
        bytes: target_bytes(target, batch * rows) + kv + sequences * 2.0 * 4.0 * states,
        // Each row uses the weights that a pass of one row reads.
        flops: target_bytes(target, 1) / ELEMENT * 2.0 * all
            + sequences * attention_flops(stack, context, rows)
            + all * 7.0 * states,
    }
}

/// The drafts of a round with a chain: a step for each draft, after as many rows of features as the round
/// has.
fn chain_pass(
    target: &TargetConfig,
    drafter: &DrafterConfig,
    context: usize,
    batch: usize,
    block: usize,
) -> Pass {
    let stack = &drafter.stack;
    let [h, _, _, kv] = sizes(stack);
    let (sequences, all, steps) = (batch as f64, (batch * block) as f64, (block - 1) as f64);
    let (fc, step) = (fc_bytes(drafter), chain_step_bytes(target, drafter));
    let moved = sequences * steps * positions_read(stack, context) + all;
    let pairs = fc + 4.0 * kv * h * ELEMENT;
    Pass {
        bytes: fc + steps * step + moved * kv_bytes(stack),
        flops: (pairs * all + step * steps * sequences) / ELEMENT * 2.0
            + sequences * steps * attention_flops(stack, context, 1),
    }
}

/// A pass of the drafter over `block` rows of each of `batch` sequences that have `context` positions. It
/// includes the injection of as many rows of features, which a captured round always computes. For a chain,
/// all steps of a round.
pub fn draft_pass(
    target: &TargetConfig,
    drafter: &DrafterConfig,
    context: usize,
    batch: usize,
    block: usize,
) -> Pass {
    if drafter.chain().is_some() {
        return chain_pass(target, drafter, context, batch, block);
    }
    let stack = &drafter.stack;
    let [h, _, _, kv] = sizes(stack);
    let (sequences, all) = (batch as f64, (batch * block) as f64);
    let layers = stack.attention.len() as f64;
    let block_weights = layers_bytes(stack, 1) + draft_head_bytes(target, drafter);
    let feature_weights = fc_bytes(drafter) + layers * 2.0 * kv * h * ELEMENT;
    let moved = sequences * positions_read(stack, context) + all * layers;
    Pass {
        bytes: drafter_bytes(target, drafter) + moved * kv_bytes(stack),
        flops: (block_weights + feature_weights) / ELEMENT * 2.0 * all
            + sequences * attention_flops(stack, context, block),
    }
}

//! Counts the kernels of rounds on the software GPU, and splits their counters into costs of a block and of a
//! unit of work: the table `src/gpu/prediction/kernel_costs.txt`.

use crate::support::test_gpu::TestGpu;
use dflash::Result;
use dflash::checkpoint::folder::Folder;
use dflash::checkpoint::pair::Pair;
use dflash::engine::generate::Request;
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::decoder::{Batch, Models};
use dflash::gpu::device::{Arg, Buffer, Counts, Device, Launch, Node};
use dflash::gpu::prediction::costs::{COUNTERS, Costs};
use dflash::gpu::prediction::work::{Point, QUANTITIES, Work};
use dflash::spec::config::{ExactDrafts, SpecConfig};
use dflash::spec::draft_length::DraftLengthPolicy;
use dflash::spec::sampling::SamplingParams;
use std::collections::BTreeMap;
use std::fmt::Write;

/// Sizes of a pair of two layers and one: hidden and MLP size, query and key/value heads, head size, vocabulary.
#[derive(Debug, Clone, Copy)]
pub struct Sizes(pub [usize; 6]);

/// A round: sequences, rows of a block, of a tree (0: chains), context, and top-k (0: all) and top-p of sampling at
/// temperature 1; no sampling: greedy.
#[derive(Debug, Clone, Copy)]
pub struct Round(pub [usize; 4], pub Option<(usize, f64)>);

/// Pairs whose linear kernels have short and long slices of K, one and several, and their rounds. One has the
/// vocabulary of Qwen3, the last has heads of 64 and more contexts.
pub fn cases() -> Vec<(Sizes, Vec<Round>)> {
    let greedy = |sequences, block, context| Round([sequences, block, 0, context], None);
    let tree = |rows, context| Round([1, 16, rows, context], None);
    let sampled = |top_k, top_p| Round([1, 16, 0, 112], Some((top_k, top_p)));
    // With 16 rows these contexts fill their last page, in different numbers of splits.
    let rows = [1, 8, 16].map(|block| greedy(1, block, 112)).into_iter();
    let batches = [2, 4, 8].map(|sequences| greedy(sequences, 16, 112)).into_iter();
    let rows: Vec<Round> = rows.chain(batches).chain([tree(64, 112), sampled(0, 1.0)]).collect();
    let contexts = [48, 560, 1136, 1712].into_iter().flat_map(|context| {
        let attention = [greedy(1, 1, context), greedy(1, 8, context), greedy(1, 16, context)];
        attention.into_iter().chain([16, 32, 64].map(|rows| tree(rows, context)))
    });
    let contexts = [&rows[..], &contexts.collect::<Vec<_>>()].concat();
    let vocabulary =
        [greedy(1, 16, 112), tree(64, 112), sampled(0, 1.0), sampled(20, 0.95), sampled(64, 1.0)];
    let logits = [(1, 1), (1, 8), (2, 16), (4, 16), (8, 16)];
    let logits = logits.map(|(sequences, block)| Round([sequences, block, 0, 48], Some((20, 0.95))));
    vec![
        (Sizes([256, 1024, 4, 1, 128, 40064]), [&contexts[..], &vocabulary[3..], &logits].concat()),
        (Sizes([256, 512, 2, 1, 64, 151936]), vocabulary.to_vec()),
        (Sizes([384, 1536, 8, 2, 128, 50048]), rows.clone()),
        (Sizes([1024, 2048, 8, 2, 128, 33024]), rows.clone()),
        (Sizes([1280, 5120, 64, 16, 128, 8192]), rows.clone()),
        (Sizes([256, 1024, 8, 2, 64, 8192]), contexts),
    ]
}

/// Pairs with a DFlash2 drafter and their rounds. Only the kernels that other drafters do not have are counted:
/// convolutions in whole tiles of outputs, with 2 to 8 slices of K; output projections with one slice of K and
/// several, short and long; the selector with and without the vocabulary of Qwen3.
pub fn dflash2_cases() -> Vec<(Sizes, Vec<Round>)> {
    let rounds = [(1, 8), (1, 16), (2, 16), (4, 16), (8, 16)];
    let rounds: Vec<Round> = rounds.map(|(sequences, block)| Round([sequences, block, 0, 112], None)).into();
    vec![
        (Sizes([512, 1024, 4, 1, 128, 40064]), rounds.clone()),
        (Sizes([1024, 5120, 16, 4, 128, 33024]), rounds.clone()),
        (Sizes([2560, 1024, 8, 2, 128, 8192]), rounds.clone()),
        (Sizes([3072, 512, 1, 1, 128, 8192]), rounds.clone()),
        (Sizes([512, 512, 2, 1, 64, 151936]), rounds[..2].to_vec()),
    ]
}

/// Whether only DFlash2 drafters have the kernel.
pub fn is_of_dflash2(work: &Work) -> bool {
    ["convolve", "project_convolved", "selector"].iter().any(|name| work.variant.starts_with(name))
}

/// The kernels of a round that was counted: work and counters of each launch, or of its last blocks and of all
/// others.
pub type Counted = Vec<(Work, [f64; COUNTERS.len()])>;

fn folder(name: &'static str, config: String) -> Folder {
    let config: &'static [u8] = config.leak().as_bytes();
    Folder::Embedded { name, files: Box::leak(Box::new([("config.json", config)])) }
}

/// A pair with random weights; `dflash2`: with a DFlash2 drafter.
pub fn pair(sizes: Sizes, dflash2: bool) -> Result<Pair> {
    let [hidden, inner, heads, kv_heads, head_dim, vocab] = sizes.0;
    let common = format!(
        r#""model_type": "qwen3", "hidden_size": {hidden}, "intermediate_size": {inner},
        "num_attention_heads": {heads}, "num_key_value_heads": {kv_heads}, "head_dim": {head_dim},
        "vocab_size": {vocab}, "max_position_embeddings": 40960, "rope_theta": 1000000, "rms_norm_eps": 1e-06,
        "hidden_act": "silu", "attention_bias": false, "tie_word_embeddings": false"#
    );
    let target = format!(
        r#"{{ "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 2, "eos_token_id": 1, {common} }}"#
    );
    let [architecture, more] = match dflash2 {
        true => ["DFlash2DraftModel", r#", "conv_kernel_size": 2, "selector_rank": 256"#],
        false => ["DFlashDraftModel", ""],
    };
    let drafter = format!(
        r#"{{ "architectures": ["{architecture}"], "num_hidden_layers": 1, "block_size": 16, "num_target_layers": 2,
        "dflash_config": {{ "mask_token_id": 2, "target_layer_ids": [0]{more} }}, {common} }}"#
    );
    Pair::with_random_weights(folder("sizes", target), Some(folder("sizes-dflash", drafter)))
}

/// Runs a round launch by launch.
pub fn count(device: &TestGpu, models: &Models, round: Round) -> Result<Counted> {
    let Round([sequences, block, rows, context], filters) = round;
    let (top_k, top_p) = filters.unwrap_or((0, 1.0));
    let temperature = if filters.is_some() { 1.0 } else { 0.0 };
    let sampling = SamplingParams { temperature, top_k, top_p, seed: 1, ..SamplingParams::default() };
    let drafts = if rows > 0 { ExactDrafts::BestFirstTree { rows } } else { ExactDrafts::Chain };
    let spec = SpecConfig::Exact { drafts, length: DraftLengthPolicy::default() };
    let config = BatchConfig::new(sequences, block, context + 80).with_trees(rows);
    let mut batch = Batch::new(device, models, config)?;
    for slot in 0..sequences {
        let request = Request {
            prompt: vec![],
            max_tokens: 64,
            sampling: sampling.clone(),
            stop_ids: vec![],
            block,
            spec: spec.clone(),
        };
        batch.fill_synthetic_context(slot, context, &request)?;
    }
    let point = Point { context, rows: config.max_verify_rows(), depth: block, sampling };
    let nodes = batch.largest(filters.is_some())?.nodes.clone();
    let mut counted = vec![];
    for node in &nodes {
        let Node::Launch(launch) = node else {
            node.enqueue(device)?;
            continue;
        };
        let run = || {
            device.reset_counts();
            node.enqueue(device)?;
            Ok::<_, dflash::Error>(numbers(&device.counts()[launch.kernel.name]))
        };
        let work = Work::of(launch, &point);
        // A merge of attention where each sequence has one split.
        if work.blocks() == 0.0 {
            node.enqueue(device)?;
            continue;
        }
        let Some(counters) = arrivals(launch) else {
            counted.push((work, run()?));
            continue;
        };
        // With such counters no block is the last one.
        device.fill(counters, 0x40)?;
        let own = run()?;
        device.fill(counters, 0)?;
        let all = run()?;
        counted.push((work.part(false), own));
        counted.push((work.part(true), std::array::from_fn(|i| all[i] - own[i])));
    }
    Ok(counted)
}

/// The counters of blocks that have arrived, of a linear kernel that splits K.
fn arrivals(launch: &Launch) -> Option<&Buffer> {
    let linear = ["qkv", "project", "swiglu", "head", "inject"].contains(&launch.kernel.file);
    match &launch.args[..] {
        [_, _, _, _, _, Arg::Buffer(counters), ..] if linear && launch.grid[1] > 1 => Some(counters),
        _ => None,
    }
}

/// The blocks that do this work.
fn blocks(work: &Work) -> f64 {
    let [blocks, _, merges, ..] = work.quantities;
    if blocks > 0.0 { blocks } else { merges }
}

/// The counters in the order of [`COUNTERS`].
fn numbers(counts: &Counts) -> [f64; COUNTERS.len()] {
    let Counts { instructions, slow, shared, conflicts, mma, barriers, fences, .. } = *counts;
    let bytes = counts.streamed + counts.read + counts.written;
    // A conflict is one more pass, and an access has four.
    let shared = shared + conflicts / 4;
    [instructions, slow, shared, mma, barriers, fences, bytes].map(|n| n as f64)
}

/// The costs with the least squares of errors in the counters of a block.
fn fit(counted: &[&(Work, [f64; COUNTERS.len()])]) -> Costs {
    const N: usize = QUANTITIES.len();
    let mut costs = Costs::default();
    for counter in 0..COUNTERS.len() {
        let mut matrix = [[0.0; N + 1]; N];
        for (work, counters) in counted {
            let weight = 1.0 / blocks(work).max(1.0);
            let x = work.quantities.map(|quantity| quantity * weight);
            for i in 0..N {
                (0..N).for_each(|j| matrix[i][j] += x[i] * x[j]);
                matrix[i][N] += x[i] * counters[counter] * weight;
            }
        }
        let solved = solve(matrix);
        (0..N).for_each(|quantity| costs[quantity][counter] = solved[quantity]);
    }
    costs
}

/// The solution of `N` equations by elimination; 0 for unknowns that the equations do not determine.
fn solve<const N: usize, const M: usize>(mut rows: [[f64; M]; N]) -> [f64; N] {
    let scale: [f64; N] = std::array::from_fn(|i| rows[i][i]);
    let mut known = [false; N];
    for i in 0..N {
        if rows[i][i] <= 1e-9 * scale[i] {
            continue;
        }
        known[i] = true;
        for other in (0..N).filter(|&other| other != i) {
            let factor = rows[other][i] / rows[i][i];
            (0..M).for_each(|j| rows[other][j] -= factor * rows[i][j]);
        }
    }
    std::array::from_fn(|i| if known[i] { rows[i][M - 1] / rows[i][i] } else { 0.0 })
}

/// Counts all [`cases`] and [`dflash2_cases`].
pub fn count_all() -> Result<Counted> {
    let device = TestGpu::new();
    let mut all = vec![];
    for (sizes, rounds) in cases() {
        let pair = pair(sizes, false)?;
        let models = Models::load(&device, &pair, 2048)?;
        for round in rounds {
            all.extend(count(&device, &models, round)?);
        }
    }
    for (sizes, rounds) in dflash2_cases() {
        let pair = pair(sizes, true)?;
        let models = Models::load(&device, &pair, 2048)?;
        for round in rounds {
            all.extend(count(&device, &models, round)?.into_iter().filter(|(work, _)| is_of_dflash2(work)));
        }
    }
    Ok(all)
}

/// The table: for each kernel the costs of its quantities.
pub fn table() -> Result<String> {
    let counted = count_all()?;
    let mut kernels: BTreeMap<&str, Vec<&(Work, [f64; COUNTERS.len()])>> = BTreeMap::new();
    counted.iter().for_each(|one| kernels.entry(&one.0.variant).or_default().push(one));
    let columns: String = COUNTERS.iter().map(|name| format!("{name:>13}")).collect();
    let mut out = format!("{:28}{:7}{columns}\n", "kernel", "per");
    for (kernel, counted) in kernels {
        for (quantity, costs) in QUANTITIES.iter().zip(fit(&counted)) {
            if costs.iter().any(|cost| cost.abs() >= 0.005) {
                let rounded = costs.map(|cost| if cost.abs() < 0.005 { 0.0 } else { cost });
                let numbers: String = rounded.iter().map(|cost| format!("{cost:>13.2}")).collect();
                let _ = writeln!(out, "{kernel:28}{quantity:7}{numbers}");
            }
        }
    }
    Ok(out)
}

//! Counters of every kernel for the demo pair on the software GPU: a table of exact numbers that do not depend on
//! the number of threads.

use crate::support::test_gpu::TestGpu;
use dflash::Result;
use dflash::checkpoint::folder::{DEMO_DRAFTER, DEMO_TARGET};
use dflash::checkpoint::pair::Pair;
use dflash::engine::generate::{Decoder, Request};
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::decoder::{Batch, DrafterMode, Models, RoundShape};
use dflash::gpu::device::{Counts, Device};
use dflash::spec::sampling::SamplingParams;
use std::fmt::Write;

/// Tokens of each prompt, and capacity of a sequence in positions.
const PROMPT: u32 = 40;
const POSITIONS: usize = 128;

/// The table: a header, then for each case one line per kernel and one for their sum.
pub fn table() -> Result<String> {
    let pair = Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER))?;
    let device = TestGpu::new();
    let models = Models::load(&device, &pair, POSITIONS)?;
    let mut out = line(["kernel", "launches", "blocks", "streamed", "read", "written", "mma", "conflicts"]);
    for (name, sequences, block, temperature) in [
        ("AR step of 1 sequence", 1, 1, 0.0),
        ("round of 1 sequence", 1, 16, 0.0),
        ("round of 4 sequences", 4, 16, 0.0),
        ("round of 1 sequence, sampled", 1, 16, 0.8),
    ] {
        let mut batch = Batch::new(&device, &models, BatchConfig::new(sequences, block, POSITIONS))?;
        device.reset_counts();
        for slot in 0..sequences {
            batch.admit(slot, &request(slot as u32, block, temperature), false)?;
            batch.prefill(slot)?;
            if slot == 0 && name == "round of 1 sequence" {
                case(&mut out, &format!("prompt of {PROMPT} tokens"), &device);
            }
        }
        let shape = RoundShape {
            sequences,
            rows: block,
            drafter: if block > 1 { DrafterMode::Draft } else { DrafterMode::Idle },
            sampled: temperature > 0.0,
            sampled_drafts: false,
        };
        let graph = batch.capture(shape)?;
        device.reset_counts();
        device.replay(&graph)?;
        case(&mut out, name, &device);
    }
    Ok(out)
}

fn request(slot: u32, block: usize, temperature: f32) -> Request {
    let sampling = SamplingParams { temperature, top_k: 0, top_p: 0.9, min_p: 0.0, seed: 1, stream: slot };
    let prompt = (0..PROMPT).map(|i| 300 + i * 13 + slot).collect();
    Request { prompt, max_tokens: 64, sampling, stop_ids: vec![], block, spec: Default::default() }
}

fn case(out: &mut String, name: &str, device: &TestGpu) {
    let mut all = Counts::default();
    let _ = writeln!(out, "\n{name}");
    for (kernel, counts) in device.counts() {
        *out += &counted(&kernel, &counts);
        all += counts;
    }
    *out += &counted("all", &all);
}

fn counted(name: &str, counts: &Counts) -> String {
    let Counts { launches, blocks, streamed, read, written, mma, conflicts, .. } = *counts;
    let numbers = [launches, blocks, streamed, read, written, mma, conflicts].map(|n| n.to_string());
    let [launches, blocks, streamed, read, written, mma, conflicts] = &numbers;
    line([name, launches, blocks, streamed, read, written, mma, conflicts])
}

fn line(cells: [&str; 8]) -> String {
    let [name, numbers @ ..] = cells;
    let numbers: String = numbers.iter().map(|n| format!("{n:>11}")).collect();
    format!("{name:24}{numbers}\n")
}

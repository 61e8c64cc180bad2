//! Predicts the time of each launch of a round on a card, before a card has run it: from counters of the
//! kernels, the shapes of the launches, and constants of the hardware.
//!
//! A launch runs its blocks in waves of as many as fit on the card. A wave takes as long as the slowest of its
//! resources: memory, L2 cache, issue slots, slow units, shared memory, tensor cores. Around the waves there are
//! delays that no throughput shortens: the start of the launch, dependent loads, barriers, the hand-over to the
//! block that merges. Where launches may overlap, weights that a block loads before it waits for the previous
//! launch cost nothing, as far as the memory was idle during that launch.

pub mod costs;
pub mod work;

use crate::gpu::device::{Launch, Node};
use crate::perf::roofline::Card;
use crate::{Error, Result};
use costs::{COUNTERS, Costs};
use work::{Point, Work};

/// Constants of the hardware, the only ones of the prediction apart from a card's figures. This project has not
/// measured them on a card yet; the comments name their sources. Clocks are those of an SM.
mod constants {
    /// From the end of a launch to the start of the next, in us: the pause that an H100 makes inside a graph
    /// (Hazy Research, "no bubbles"), and an assumed half of it where launches may overlap.
    pub const LAUNCH_US: f64 = 1.3;
    pub const OVERLAPPED_LAUNCH_US: f64 = 0.7;
    /// A load that hits L2, in us: about 270 clocks on an H100 in published microbenchmarks.
    pub const L2_US: f64 = 0.15;
    /// A load from memory under load, in us (700 to 1000 ns).
    pub const MEMORY_US: f64 = 0.8;
    /// Dependent loads before the first product or sum: tables and flags, then data.
    pub const LOADS_BEFORE_WORK: f64 = 2.0;
    /// The release, the atomic addition and the acquire of a hand-over between blocks, in us: three trips to L2
    /// and the wait for the block's stores.
    pub const HAND_OVER_US: f64 = 0.8;
    /// A fence to the whole device or the host, in us (about one trip to memory).
    pub const FENCE_US: f64 = 0.8;
    /// A block that returns at once, in us: start, one or two loads, end.
    pub const IDLE_BLOCK_US: f64 = 0.8;
    /// A barrier of a block, in clocks (20 to 40 in published microbenchmarks).
    pub const BARRIER_CLOCKS: f64 = 30.0;
    /// Warp instructions that an SM issues in a clock: one on each of four schedulers.
    pub const ISSUE: f64 = 4.0;
    /// Clocks from one instruction of a warp to its next: a result is available after 4, and it is assumed that a
    /// third of the instructions need the one before.
    pub const WARP_CLOCKS: f64 = 2.0;
    /// Clocks of an SM for a warp instruction of the slow units, which have 16 lanes (CUDA programming guide).
    pub const SLOW_CLOCKS: f64 = 2.0;
    /// Passes of shared memory for a warp access of 16 bytes a lane, which the large kernels have; an SM makes
    /// one of 128 bytes in a clock.
    pub const SHARED_CLOCKS: f64 = 4.0;
    /// Bytes that one SM gets from L2 in a clock at most, and what all SMs together reach for each: 5.5 TB/s on an
    /// H200.
    pub const L2_SM_BYTES: f64 = 64.0;
    pub const L2_BYTES: f64 = 23.0;
    /// The fraction of the nominal rate that `mma.sync` reaches on Hopper (arXiv 2501.12084).
    pub const TENSOR: f64 = 0.63;
    /// Operations of a product m16n8k16.
    pub const MMA: f64 = 4096.0;
    /// Shared memory that the system takes for a block, and registers are given to warps in units of this.
    pub const RESERVED_SHARED: u32 = 1024;
    pub const REGISTER_UNIT: u32 = 256;
}
use constants::*;

/// Sizes of a card that the roofline does not need, from its vendor.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Chip {
    card: &'static str,
    capability: (u32, u32),
    multiprocessors: u32,
    /// The clock at which the tensor cores have the nominal rate, in MHz.
    mhz: f64,
}

const fn chip(card: &'static str, capability: (u32, u32), multiprocessors: u32, mhz: f64) -> Chip {
    Chip { card, capability, multiprocessors, mhz }
}

const CHIPS: [Chip; 12] = [
    chip("H200", (9, 0), 132, 1830.0),
    chip("H100-SXM", (9, 0), 132, 1830.0),
    chip("H100-PCIe", (9, 0), 114, 1620.0),
    chip("GH200", (9, 0), 132, 1830.0),
    chip("B200", (10, 0), 148, 1855.0),
    chip("A100-80GB", (8, 0), 108, 1410.0),
    chip("A100-40GB", (8, 0), 108, 1410.0),
    chip("L40S", (8, 9), 142, 2490.0),
    chip("L4", (8, 9), 58, 2040.0),
    chip("RTX-5090", (12, 0), 170, 2407.0),
    chip("RTX-4090", (8, 9), 128, 2520.0),
    chip("RTX-3090", (8, 6), 82, 1695.0),
];

/// A card to predict for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gpu {
    /// Its nominal figures, with the bandwidth to reckon with in GB/s.
    pub card: Card,
    chip: Chip,
}

impl Gpu {
    /// The card of [`crate::perf::roofline::CARDS`], with a read ceiling in GB/s instead of its nominal
    /// bandwidth if there is one.
    ///
    /// # Errors
    /// [`Error::Internal`] for a card with unknown sizes.
    pub fn new(card: Card, ceiling: Option<f64>) -> Result<Gpu> {
        let chip = CHIPS.into_iter().find(|chip| chip.card == card.name);
        let chip = chip.ok_or_else(|| Error::Internal(format!("the sizes of {} are unknown", card.name)))?;
        Ok(Gpu { card: Card { bandwidth: ceiling.unwrap_or(card.bandwidth), ..card }, chip })
    }

    fn overlaps(&self) -> bool {
        self.chip.capability >= (9, 0)
    }

    /// Blocks of a launch that are resident on an SM.
    fn resident(&self, launch: &Launch) -> Result<u32> {
        let (threads, own) = (launch.kernel.threads, costs::resources(launch.kernel.name)?);
        let registers = if self.overlaps() { own.registers_90 } else { own.registers_80 };
        let (shared, most_threads, most_blocks) = match self.chip.capability {
            (8, 0) => (164, 2048, 32),
            (8, 6) => (100, 1536, 16),
            (8, 9) | (12, 0) => (100, 1536, 24),
            _ => (228, 2048, 32),
        };
        let of_warps = threads.div_ceil(32) * (registers * 32).next_multiple_of(REGISTER_UNIT);
        let of_block = launch.shared + own.shared + RESERVED_SHARED;
        let fits = [(64 << 10) / of_warps, (shared << 10) / of_block, most_threads / threads, most_blocks];
        Ok(fits.into_iter().min().unwrap_or(0).max(1))
    }
}

/// What can decide the time of a launch, in the order of [`Time::terms`].
pub const TERMS: [&str; 7] = ["memory", "L2", "issue", "slow units", "shared", "tensor", "latency"];

/// The predicted time of a launch.
#[derive(Debug, Clone, PartialEq)]
pub struct Time {
    /// Time from the end of the previous launch to the end of this one, in us.
    pub us: f64,
    /// The time of each of [`TERMS`] by itself, in us.
    pub terms: [f64; 7],
    /// Blocks with work, and blocks that return at once.
    pub blocks: [f64; 2],
    /// Blocks with work over those that are resident at the same time.
    pub waves: f64,
}

impl Time {
    /// The longest of [`TERMS`].
    pub fn decides(&self) -> &'static str {
        decides(&self.terms)
    }
}

/// The longest of [`TERMS`].
pub fn decides(terms: &[f64; 7]) -> &'static str {
    let longest = (0..TERMS.len()).max_by(|&a, &b| terms[a].total_cmp(&terms[b]));
    TERMS[longest.unwrap_or(0)]
}

/// What the next launch sees of a launch.
#[derive(Default)]
struct Previous {
    /// Time in which the memory was idle, in us.
    idle_us: f64,
    /// The fraction of the resident blocks that it left free.
    free: f64,
}

/// The predicted time of each step of a round, in order.
///
/// # Errors
/// [`Error::Unsupported`] for a kernel that was not counted.
pub fn times(nodes: &[Node], point: &Point, gpu: &Gpu) -> Result<Vec<Time>> {
    let mut previous = Previous::default();
    let mut time = |node: &Node| match node {
        Node::Launch(launch) => {
            let work = Work::of(launch, point);
            launch_time(launch, &work, costs::costs(&work.variant)?, gpu, &mut previous)
        }
        // A few bytes.
        Node::Copy { .. } | Node::Fill { .. } => {
            previous = Previous::default();
            let terms = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, LAUNCH_US];
            Ok(Time { us: LAUNCH_US, terms, blocks: [0.0; 2], waves: 0.0 })
        }
    };
    nodes.iter().map(&mut time).collect()
}

fn launch_time(
    launch: &Launch,
    work: &Work,
    costs: &Costs,
    gpu: &Gpu,
    previous: &mut Previous,
) -> Result<Time> {
    let (chip, card) = (&gpu.chip, &gpu.card);
    let sms = f64::from(chip.multiprocessors);
    let concurrent = f64::from(gpu.resident(launch)?) * sms;
    let warps = f64::from(launch.kernel.threads.div_ceil(32));
    let bandwidth = card.bandwidth * 1e3; // bytes in a us

    // Counters of a block before it hands over, and of a block that finishes.
    let average = |at_the_end: bool, blocks: f64| -> [f64; COUNTERS.len()] {
        costs::counters(costs, &work.part(at_the_end).quantities.map(|quantity| quantity / blocks.max(1.0)))
    };
    let own = average(false, work.blocks());
    let last = average(true, work.quantities[2]);
    let [instructions, slow, shared, mma, barriers, fences, bytes] = own;
    let memory_bytes = work.memory_bytes / work.blocks();
    let in_flight = work.in_flight + if gpu.overlaps() { work.prefetch } else { 0.0 };

    let mut terms = [0.0; 7];
    let mut waves_us = 0.0;
    let mut left = work.blocks();
    while left > 0.0 {
        let blocks = left.min(concurrent);
        left -= blocks;
        let on_sm = (blocks / sms).ceil();
        let clocks = [
            (on_sm * instructions / ISSUE).max(instructions / warps * WARP_CLOCKS),
            on_sm * slow * SLOW_CLOCKS,
            on_sm * shared * SHARED_CLOCKS,
        ];
        let [issue, slow, shared] = clocks.map(|clocks| clocks / chip.mhz);
        let latency_bound = if in_flight > 0.0 { memory_bytes / in_flight * MEMORY_US } else { 0.0 };
        let memory = (blocks * memory_bytes / bandwidth).max(latency_bound);
        let all_sms = blocks * bytes / (L2_BYTES * sms);
        let l2 = all_sms.max(on_sm * bytes / L2_SM_BYTES) / chip.mhz;
        let tensor = on_sm * mma * MMA / (TENSOR * card.tflops * 1e6 / sms);
        let wave = [memory, l2, issue, slow, shared, tensor];
        waves_us += wave.into_iter().fold(0.0, f64::max);
        wave.into_iter().zip(&mut terms).for_each(|(us, sum)| *sum += us);
    }

    // Weights that arrive while the previous launch leaves the memory idle. The first ones go to registers, so
    // that they have also passed L2.
    let early_blocks = if gpu.overlaps() { work.blocks().min(concurrent * previous.free) } else { 0.0 };
    let early_bytes = (early_blocks * work.early_bytes).min(previous.idle_us * bandwidth);
    let early_l2 = early_bytes.min(early_blocks * work.in_flight) / (L2_BYTES * sms) / chip.mhz;
    let others = terms[2..6].iter().copied().fold(terms[1] - early_l2, f64::max);
    let early = (early_bytes / bandwidth).min(terms[0]).min((waves_us - others).max(0.0));

    let idle_at_once = (concurrent - work.blocks()).max(sms);
    let idle_us = (work.idle / idle_at_once).ceil() * IDLE_BLOCK_US;
    let start = if gpu.overlaps() { OVERLAPPED_LAUNCH_US } else { LAUNCH_US };
    let mut delay = start + LOADS_BEFORE_WORK * L2_US;
    delay += barriers / warps * BARRIER_CLOCKS / chip.mhz + fences / warps * FENCE_US;
    let [hand_overs, bytes] = work.hand_overs;
    let issue = (last[0] * WARP_CLOCKS + last[4] * BARRIER_CLOCKS) / warps;
    delay += hand_overs * (HAND_OVER_US + L2_US) + issue.max(bytes / L2_SM_BYTES) / chip.mhz;
    terms[6] = delay;
    let us = delay + (waves_us - early).max(idle_us);
    *previous = Previous {
        idle_us: us - (terms[0] - early).max(0.0),
        free: 1.0 - (work.blocks() / concurrent).min(1.0),
    };
    Ok(Time { us, terms, blocks: [work.blocks(), work.idle], waves: work.blocks() / concurrent })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::perf::roofline::CARDS;

    #[test]
    fn every_card_of_the_roofline_can_be_predicted_for() {
        for card in CARDS {
            let gpu = Gpu::new(card, None).unwrap();
            // An SM has a power of two of operations in a clock.
            let each = card.tflops * 1e6 / (f64::from(gpu.chip.multiprocessors) * gpu.chip.mhz);
            let power = each.log2().round().exp2();
            assert!((each / power - 1.0).abs() < 0.01, "{}: {each}", card.name);
        }
    }

    #[test]
    fn costs_are_read_by_quantity() {
        let text = "kernel per a b\nx unit 1 2 3 4 5 6 7.5\nx block 1 1 1 1 1 1 1\nnonsense\n";
        let all = costs::parse(text);
        assert_eq!(all.len(), 1);
        let found = costs::counters(&all["x"], &[2.0, 10.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(found, [12.0, 22.0, 32.0, 42.0, 52.0, 62.0, 77.0]);
    }
}

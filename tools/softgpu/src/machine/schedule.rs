//! Decides which block and which warp runs next, and which launches overlap.

use super::block::{Block, Env, RANGES, Range};
use super::counters::{Counters, Counts};
use super::exec;
use super::fault::{Fault, Trouble};
use super::global::Global;
use super::lanes::Vectors;
use super::warp::{Line, State};
use super::{Launch, Options};
use crate::card::Card;
use crate::memory::Snapshot;
use std::cell::RefCell;

/// Instructions that a warp runs before another one gets its turn, if nothing else stops it.
const SLICE: u64 = 1 << 16;
/// Instructions without any effect that others can see, after which a chain counts as hung.
const HUNG: u64 = 1 << 28;

/// What is kept from run to run: memory, and the shadow of global memory.
#[derive(Default)]
struct Scratch {
    global: Global,
    blocks: Vec<Block>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// The progress of one launch.
struct Progress {
    constants: Vec<Line>,
    ranges: [Range; RANGES],
    counts: Counts,
    blocks: u32,
    /// Blocks started, blocks that have allowed dependent launches or ended, blocks ended.
    started: u32,
    launched: u32,
    ended: u32,
    /// Resident blocks at most.
    limit: usize,
}

impl Progress {
    fn new(launch: &Launch, card: &Card) -> Progress {
        let kernel = &launch.kernel;
        let threads = launch.block.iter().product::<u32>().max(1);
        let per_block = threads.next_multiple_of(32) * kernel.registers.next_multiple_of(8);
        let shared = kernel.shared + launch.shared + card.shared_reserved;
        let per_multiprocessor = (card.registers / per_block)
            .min(card.threads_per_multiprocessor / threads)
            .min(card.shared_per_multiprocessor.checked_div(shared).unwrap_or(u32::MAX))
            .clamp(1, card.blocks_per_multiprocessor);
        Progress {
            constants: exec::constant_rows(kernel, &launch.params),
            ranges: [Range::NONE; RANGES],
            counts: Counts::new(kernel),
            blocks: launch.grid.iter().product(),
            started: 0,
            launched: 0,
            ended: 0,
            limit: (per_multiprocessor * card.multiprocessors) as usize,
        }
    }
}

/// Random numbers (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) % n.max(1) as u64) as usize
    }
}

struct Machine<'a> {
    chain: &'a [Launch],
    snapshot: &'a Snapshot,
    card: &'a Card,
    options: &'a Options,
    vectors: Vectors,
    global: Global,
    /// Blocks that are not in use.
    spare: Vec<Block>,
    resident: Vec<Resident>,
    progress: Vec<Progress>,
    random: Random,
    /// Whether dependent launches start as early as they may.
    eager: bool,
    /// Blocks that run interleaved.
    window: usize,
}

struct Resident {
    block: Block,
    /// It has allowed dependent launches.
    launched: bool,
    /// The warp that runs next, in order.
    turn: usize,
}

/// Runs a chain of launches.
pub(super) fn run(
    chain: &[Launch],
    snapshot: &Snapshot,
    card: &Card,
    options: &Options,
) -> Result<Vec<Counters>, Fault> {
    for launch in chain {
        check(launch, card)?;
    }
    let mut scratch = SCRATCH.take();
    scratch.global.begin(chain);
    let mut random = Random(options.schedule);
    let shuffled = options.schedule >= 2;
    let mut machine = Machine {
        chain,
        snapshot,
        card,
        options,
        vectors: options.vectors.of_this_cpu(),
        eager: options.schedule == 1 || shuffled && random.below(4) > 0,
        window: if shuffled { 1 + random.below(6) } else { 1 },
        global: scratch.global,
        spare: scratch.blocks,
        resident: Vec::new(),
        progress: chain.iter().map(|launch| Progress::new(launch, card)).collect(),
        random,
    };
    let result = machine.go();
    let counters = chain
        .iter()
        .zip(&machine.progress)
        .map(|(launch, p)| p.counts.finish(&launch.kernel, u64::from(p.blocks)))
        .collect();
    machine.spare.extend(machine.resident.drain(..).map(|r| r.block));
    SCRATCH.set(Scratch { global: machine.global, blocks: machine.spare });
    result.map(|()| counters)
}

/// The limits of a launch.
fn check(launch: &Launch, card: &Card) -> Result<(), Fault> {
    let kernel = &launch.kernel;
    let threads = launch.block.iter().map(|n| u64::from(*n)).product::<u64>();
    let blocks = launch.grid.iter().map(|n| u64::from(*n)).product::<u64>();
    let shared = u64::from(kernel.shared) + u64::from(launch.shared);
    let limit = kernel.max_threads.min(card.threads_per_block);
    let sentence = if threads == 0 || threads > u64::from(limit) {
        format!("a block of {threads} threads, but the kernel's limit is {limit}")
    } else if blocks == 0 || blocks > 1 << 24 {
        format!("a grid of {blocks} blocks")
    } else if shared > u64::from(card.shared_per_block_optin) {
        format!("{shared} bytes of shared memory, but a block has {} at most", card.shared_per_block_optin)
    } else if launch.params.len() < kernel.param_bytes() as usize {
        format!("{} bytes of parameters where {} belong", launch.params.len(), kernel.param_bytes())
    } else {
        return Ok(());
    };
    Err(Trouble::new(sentence).report(kernel, 0, [0; 3], launch.block, 0))
}

impl Machine<'_> {
    fn go(&mut self) -> Result<(), Fault> {
        let mut idle = 0;
        let mut turn = 0;
        loop {
            self.fill();
            if self.resident.is_empty() {
                return Ok(());
            }
            let Some((at, warp)) = self.choose(&mut turn) else {
                // Nothing can move: perhaps with one more block.
                if self.start_one() {
                    continue;
                }
                return Err(self.deadlock());
            };
            let slice = if self.options.schedule < 2 { SLICE } else { [1, 4, 40, 500][self.random.below(4)] };
            let used = self.slice(at, warp, slice)?;
            let changed = {
                let counts = &mut self.progress[self.resident[at].block.launch].counts;
                std::mem::take(&mut counts.changed)
            };
            let moved = self.after(at)?;
            let before = idle;
            idle = if changed || moved { 0 } else { idle + used };
            if idle / SLICE > before / SLICE {
                // It may wait for another block, perhaps one that is not resident yet.
                turn += 1;
                self.start_one();
            }
            if idle > HUNG {
                let resident = &self.resident[at.min(self.resident.len() - 1)].block;
                let launch = &self.chain[resident.launch];
                let pc =
                    resident.warps.iter().find(|w| w.state == State::Ready).map_or(0, |w| w.pcs[0] as usize);
                let text = format!("no progress in {HUNG} instructions: the blocks that run wait in a loop");
                return Err(Trouble::new(text).report(
                    &launch.kernel,
                    pc,
                    resident.core.index,
                    launch.block,
                    0,
                ));
            }
        }
    }

    /// Whether every launch before this one is complete as far as it is concerned.
    fn predecessors_done(&self, launch: usize) -> bool {
        launch == 0 || self.complete(launch - 1)
    }

    fn complete(&self, launch: usize) -> bool {
        self.progress[launch].ended == self.progress[launch].blocks
    }

    /// Whether blocks of a launch may start.
    fn may_start(&self, launch: usize) -> bool {
        if self.predecessors_done(launch) {
            return true;
        }
        let before = &self.progress[launch - 1];
        self.chain[launch].dependent && before.launched == before.blocks && self.may_start(launch - 1)
    }

    /// Starts blocks up to the window.
    fn fill(&mut self) {
        while self.resident.len() < self.window && self.start_block(self.eager) {}
        // Dependent launches come on top: their first part runs before their predecessors go on.
        if self.eager {
            let last = self.resident.iter().map(|r| r.block.launch).max().unwrap_or(0);
            for launch in last..self.chain.len() {
                let mine = self.resident.iter().filter(|r| r.block.launch == launch).count();
                if !self.predecessors_done(launch) && mine < self.window {
                    self.start_of(launch);
                }
            }
        }
    }

    fn start_one(&mut self) -> bool {
        let started = self.start_block(true) || self.start_block(false);
        self.window += usize::from(started);
        started
    }

    fn start_block(&mut self, latest: bool) -> bool {
        let launches = 0..self.chain.len();
        let ready = |launch: &usize| {
            self.may_start(*launch) && self.progress[*launch].started < self.progress[*launch].blocks
        };
        let launch = if latest {
            launches.rev().find(ready)
        } else {
            let first = launches.clone().find(|launch| !self.complete(*launch));
            first.filter(ready)
        };
        launch.is_some_and(|launch| self.start_of(launch))
    }

    fn start_of(&mut self, launch: usize) -> bool {
        let progress = &self.progress[launch];
        let mine = self.resident.iter().filter(|r| r.block.launch == launch).count();
        if progress.started == progress.blocks || mine >= progress.limit || !self.may_start(launch) {
            return false;
        }
        let (n, count) = (progress.started, progress.blocks);
        let linear = match self.options.schedule {
            0 => n,
            1 => count - 1 - n,
            // A step without a common divisor visits every block once.
            seed => {
                let step = [1, 7, 11, 13].into_iter().find(|s| *s > 1 && count % s != 0).unwrap_or(1);
                ((u64::from(n) * u64::from(step) + seed) % u64::from(count)) as u32
            }
        };
        let mut block = self.spare.pop().unwrap_or_else(Block::new);
        let first_warp = self.global.first_warp(launch, linear);
        block.begin(&self.chain[launch], launch, linear, first_warp, self.options.checks.races);
        self.progress[launch].started += 1;
        let turn = if self.options.schedule == 1 { block.warps.len() - 1 } else { 0 };
        self.resident.push(Resident { block, launched: false, turn });
        true
    }

    /// The block and the warp that run next.
    fn choose(&mut self, turn: &mut usize) -> Option<(usize, usize)> {
        let blocks = self.resident.len();
        let first = if self.options.schedule < 2 { *turn % blocks } else { self.random.below(blocks) };
        for offset in 0..blocks {
            // Reversed: dependent launches, which came last, first.
            let at = if self.options.schedule == 1 {
                (2 * blocks - 1 - first - offset) % blocks
            } else {
                (first + offset) % blocks
            };
            let launch = self.resident[at].block.launch;
            let released = self.predecessors_done(launch);
            let resident = &mut self.resident[at];
            let warps = resident.block.warps.len();
            let start = if self.options.schedule < 2 { resident.turn } else { self.random.below(warps) };
            for step in 0..warps {
                let warp = if self.options.schedule == 1 {
                    (start + warps - step) % warps
                } else {
                    (start + step) % warps
                };
                let state = &mut resident.block.warps[warp].state;
                if *state == State::Dependents && released {
                    *state = State::Ready;
                }
                if *state == State::Ready {
                    resident.turn = warp;
                    return Some((at, warp));
                }
            }
        }
        None
    }

    /// Runs a warp; the instructions that it executed.
    fn slice(&mut self, at: usize, warp: usize, slice: u64) -> Result<u64, Fault> {
        let launch_index = self.resident[at].block.launch;
        let predecessors_done = self.predecessors_done(launch_index);
        let launch = &self.chain[launch_index];
        let progress = &mut self.progress[launch_index];
        let mut env = Env {
            kernel: &launch.kernel,
            launch,
            launch_index,
            card: self.card,
            options: self.options,
            vectors: self.vectors,
            constants: &progress.constants,
            snapshot: self.snapshot,
            ranges: &mut progress.ranges,
            counts: &mut progress.counts,
            global: &mut self.global,
            predecessors_done,
        };
        let Block { core, warps, .. } = &mut self.resident[at].block;
        let mut budget = slice;
        let result = exec::run(&mut env, core, &mut warps[warp], &mut budget);
        result.map_err(|trouble| {
            trouble.report(&launch.kernel, warps[warp].at, core.index, launch.block, warp)
        })?;
        // A warp that used up its slice lets the next one run.
        if budget == 0 {
            let resident = &mut self.resident[at];
            let warps = resident.block.warps.len();
            resident.turn =
                if self.options.schedule == 1 { (warp + warps - 1) % warps } else { (warp + 1) % warps };
        }
        Ok(slice - budget)
    }

    /// Barriers, and the end of a block; whether anything moved.
    fn after(&mut self, at: usize) -> Result<bool, Fault> {
        let resident = &mut self.resident[at];
        let launch = resident.block.launch;
        let kernel = &self.chain[launch].kernel;
        let shape = self.chain[launch].block;
        let released = match resident.block.release(&mut self.global) {
            Ok(released) => released,
            Err(trouble) => {
                let block = &resident.block;
                return Err(trouble.report(
                    kernel,
                    block.warps[resident.turn].at,
                    block.core.index,
                    shape,
                    resident.turn,
                ));
            }
        };
        let done = resident.block.done();
        if !resident.launched && (done || resident.block.launched()) {
            resident.launched = true;
            self.progress[launch].launched += 1;
        }
        if done {
            for (number, group) in resident.block.core.groups.iter().enumerate() {
                if let Some(warp) = group.missing() {
                    let warp = number * 4 + warp;
                    let text = format!("warp {warp} has ended without a wgmma that its warpgroup executes");
                    let pc = resident.block.warps.get(warp).map_or(0, |w| w.at);
                    return Err(Trouble::new(text).report(
                        kernel,
                        pc,
                        resident.block.core.index,
                        shape,
                        warp,
                    ));
                }
            }
            if let Err((trouble, warp, pc)) = resident.block.core.host.end(self.options.schedule) {
                return Err(trouble.report(kernel, pc, resident.block.core.index, shape, warp));
            }
            let resident = self.resident.swap_remove(at);
            self.spare.push(resident.block);
            self.progress[launch].ended += 1;
            if self.complete(launch) {
                self.global.done(launch);
            }
        }
        Ok(released || done)
    }

    /// Who waits where.
    #[cold]
    fn deadlock(&self) -> Fault {
        let first = &self.resident[0].block;
        let launch = &self.chain[first.launch];
        let mut trouble =
            Trouble::new("a deadlock: every thread that has not returned waits for another one");
        for resident in self.resident.iter().take(8) {
            let [x, y, z] = resident.block.core.index;
            let kernel = &self.chain[resident.block.launch].kernel;
            for warp in resident.block.warps.iter().filter(|w| w.state != State::Done).take(8) {
                let lane = (warp.waiting | warp.alive).trailing_zeros() as usize % 32;
                let place = kernel.place(warp.pcs[lane] as usize);
                let what = match warp.state {
                    State::Barrier { id, .. } => format!("waits at barrier {id}"),
                    _ => "waits for the launch before".to_string(),
                };
                let who = format!("{}, block ({x}, {y}, {z}), warp {}", kernel.name, warp.index);
                trouble = trouble.note(format!("{who} {what}: {place}"));
            }
        }
        let waiting: u32 = self.progress.iter().map(|p| p.blocks - p.started).sum();
        if waiting > 0 {
            trouble =
                trouble.note(format!("{waiting} blocks have not started: the card holds no more at once"));
        }
        let warp = first.warps.iter().position(|w| w.state != State::Done).unwrap_or(0);
        let lane = first.warps[warp].alive.trailing_zeros() as usize % 32;
        let pc = first.warps[warp].pcs[lane] as usize;
        trouble.report(&launch.kernel, pc, first.core.index, launch.block, warp)
    }
}

//! What a warp sees beside its own state: the launch that it belongs to and its block.

use super::counters::Counts;
use super::exec::Result;
use super::fault::Trouble;
use super::global::Global;
use super::host::HostStores;
use super::lanes::Vectors;
use super::shared::Shared;
use super::tensor::Groups;
use super::warp::{Line, State, Warp};
use super::{Launch, Options};
use crate::card::Card;
use crate::memory::Snapshot;
use crate::ptx::Kernel;

/// How many instructions have their last allocation remembered.
pub(super) const RANGES: usize = 256;

/// The allocation that an instruction accessed last.
#[derive(Clone, Copy)]
pub(super) struct Range {
    pub start: u64,
    /// Bytes; 0 for none.
    pub bytes: u64,
    pub data: *mut u8,
    pub initialised: *mut u8,
}

impl Range {
    pub const NONE: Range =
        Range { start: 0, bytes: 0, data: std::ptr::null_mut(), initialised: std::ptr::null_mut() };
}

/// A launch and its surroundings.
pub(super) struct Env<'a> {
    pub kernel: &'a Kernel,
    pub launch: &'a Launch,
    /// Position in the chain.
    pub launch_index: usize,
    pub card: &'a Card,
    pub options: &'a Options,
    /// Those of the options, as far as this CPU has them.
    pub vectors: Vectors,
    pub constants: &'a [Line],
    pub snapshot: &'a Snapshot,
    /// By the last bits of the instruction.
    pub ranges: &'a mut [Range; RANGES],
    pub counts: &'a mut Counts,
    pub global: &'a mut Global,
    /// Whether the launch before this one is complete, so that `griddepcontrol.wait` returns.
    pub predecessors_done: bool,
}

/// The part of a block that its warps share.
#[derive(Default)]
pub(super) struct Core {
    pub index: [u32; 3],
    /// Position in the grid, x first.
    pub linear: u32,
    /// The number of the block's first warp among all warps of the chain.
    pub first_warp: u32,
    pub shared: Shared,
    pub host: HostStores,
    /// [warpgroup]
    pub groups: Vec<Groups>,
}

/// A resident block.
pub(super) struct Block {
    /// Position of its launch in the chain.
    pub launch: usize,
    pub core: Core,
    pub warps: Vec<Warp>,
}

impl Block {
    pub fn new() -> Block {
        Block { launch: 0, core: Core::default(), warps: Vec::new() }
    }

    /// Puts a block at its start.
    pub fn begin(&mut self, env_launch: &Launch, launch: usize, linear: u32, first_warp: u32, races: bool) {
        let (grid, shape) = (env_launch.grid, env_launch.block);
        let threads = shape[0] * shape[1] * shape[2];
        let warps = threads.div_ceil(32) as usize;
        self.launch = launch;
        self.core.linear = linear;
        self.core.index = [linear % grid[0], linear / grid[0] % grid[1], linear / grid[0] / grid[1]];
        self.core.first_warp = first_warp;
        self.core.shared.begin(&env_launch.kernel, env_launch.shared, warps, races);
        self.core.host.begin(linear);
        self.core.groups.clear();
        self.core.groups.resize_with(warps.div_ceil(4), Groups::default);
        self.warps.resize_with(warps, Warp::new);
        for (index, warp) in self.warps.iter_mut().enumerate() {
            warp.begin(&env_launch.kernel, index, threads - index as u32 * 32);
        }
    }

    pub fn done(&self) -> bool {
        self.warps.iter().all(|warp| warp.state == State::Done)
    }

    /// Whether every thread has allowed dependent launches or returned.
    pub fn launched(&self) -> bool {
        self.warps.iter().all(|warp| warp.alive & !warp.launched == 0)
    }

    /// Lets warps pass a barrier that is complete; whether there was one.
    pub fn release(&mut self, global: &mut Global) -> Result<bool> {
        let mut released = false;
        for at in 0..self.warps.len() {
            let State::Barrier { id, threads } = self.warps[at].state else { continue };
            let here = |warp: &Warp| matches!(warp.state, State::Barrier { id: other, .. } if other == id);
            let arrived: Vec<usize> = (0..self.warps.len()).filter(|w| here(&self.warps[*w])).collect();
            for warp in &arrived {
                let state = self.warps[*warp].state;
                if state != (State::Barrier { id, threads }) {
                    return Err(Trouble::new(format!("warps arrive at barrier {id} with different counts")));
                }
            }
            let running = self.warps.iter().filter(|warp| warp.state != State::Done).count();
            let complete = match threads {
                None => arrived.len() == running,
                Some(threads) => arrived.len() as u32 * 32 >= threads,
            };
            if !complete {
                continue;
            }
            released = true;
            self.core.shared.sync(&arrived, arrived.len() == running);
            global.barrier(&self.core, &arrived);
            for warp in arrived {
                let warp = &mut self.warps[warp];
                let lanes = warp.waiting;
                for lane in 0..32 {
                    warp.pcs[lane] += lanes >> lane & 1;
                }
                warp.waiting = 0;
                warp.state = State::Ready;
            }
        }
        Ok(released)
    }
}

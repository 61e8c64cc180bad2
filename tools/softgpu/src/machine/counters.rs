//! Counts of what kernels do. They do not depend on the schedule.

use super::lanes::{LANES, lanes};
use crate::ptx::Kernel;
use crate::ptx::program::{Op, Space};
use std::collections::BTreeMap;

/// What one launch did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// The kernel's name.
    pub kernel: String,
    /// Blocks of the launch.
    pub blocks: u64,
    /// Warp instructions, all classes.
    pub instructions: u64,
    /// Warp instructions of tensor cores: mma and wgmma.
    pub tensor: u64,
    /// The matrix products of these, in units of m16n8k16.
    pub mma: u64,
    /// Warp instructions that load from or store to shared memory, ldmatrix and cp.async included.
    pub shared: u64,
    /// Warp instructions that load from or store to global memory, cp.async included.
    pub global: u64,
    /// Warp instructions on f32 and f64, conversions included.
    pub float: u64,
    /// Warp instructions that divide, convert, take roots or exponentials: those of the slow units.
    pub slow: u64,
    /// Branches executed, and those at which a warp's lanes went apart.
    pub branches: u64,
    pub divergent: u64,
    /// Barriers of blocks and of warps, counted once a warp.
    pub barriers: u64,
    /// Fences, counted once a warp.
    pub fences: u64,
    /// Atomic operations, counted once a lane.
    pub atomics: u64,
    /// Bytes that lanes loaded from and stored to global memory.
    pub bytes_read: u64,
    pub bytes_written: u64,
    /// Of the bytes read, those through the read-only path (`.nc`).
    pub bytes_streamed: u64,
    /// 32-byte sectors that the global accesses of each warp instruction touch.
    pub sectors: u64,
    /// Extra passes of shared memory because lanes access different words of a bank, by line of the PTX.
    pub conflicts: BTreeMap<u32, u64>,
}

/// Counts while a launch runs.
#[derive(Default)]
pub(super) struct Counts {
    /// [instruction]: how often warps executed it.
    pub executed: Vec<u64>,
    /// [instruction]: bytes of global memory that lanes accessed.
    bytes: Vec<u64>,
    /// [instruction]: bank conflicts.
    conflicts: Vec<u64>,
    /// [bank]: the distinct addresses of a pass, used by [`Counts::shared`].
    banks: Vec<[u64; LANES]>,
    sectors: u64,
    pub divergent: u64,
    pub atomics: u64,
    /// Set by everything that other threads can see.
    pub changed: bool,
}

impl Counts {
    pub fn new(kernel: &Kernel) -> Counts {
        // Each from the allocator: pages of zeros cost nothing until they are used.
        let zeros = || vec![0; kernel.code.len()];
        let banks = vec![[0; LANES]; LANES];
        Counts { executed: zeros(), bytes: zeros(), conflicts: zeros(), banks, ..Counts::default() }
    }

    /// Instructions so far.
    pub fn total(&self) -> u64 {
        self.executed.iter().sum()
    }

    /// Counts the sectors of an access to global memory by the lanes of `mask`.
    #[inline(always)]
    pub fn global(&mut self, pc: usize, addresses: &[u64; LANES], mask: u32, bytes: u32) {
        self.bytes[pc] += u64::from(bytes * mask.count_ones());
        if mask == 0 {
            return;
        }
        // Lanes that access nothing count as copies of the first that does.
        let first = addresses[mask.trailing_zeros() as usize] / 32;
        let mut sectors = [0; LANES];
        for lane in 0..LANES {
            sectors[lane] = if mask >> lane & 1 == 1 { addresses[lane] / 32 } else { first };
        }
        let (mut distinct, mut descents) = (1, 0);
        for lane in 1..LANES {
            distinct += u64::from(sectors[lane] != sectors[lane - 1]);
            descents += u64::from(sectors[lane] < sectors[lane - 1]);
        }
        if descents > 0 {
            distinct = 0;
            for lane in 0..LANES {
                let mut copies = 0;
                for other in 0..LANES {
                    copies |= u64::from(sectors[other] == sectors[lane]) & u64::from(other < lane);
                }
                distinct += copies ^ 1;
            }
        }
        self.sectors += distinct;
    }

    /// Counts the bank conflicts of an access to shared memory: 32 banks of 4 bytes, in passes of 128 bytes.
    #[inline(always)]
    pub fn shared(&mut self, pc: usize, addresses: &[u64; LANES], mask: u32, bytes: u32) {
        // Accesses are aligned, so that those of 8 or 16 bytes conflict as a whole.
        let width = u64::from(bytes.max(4));
        let group = 128 / width as usize;
        let shift = width.trailing_zeros();
        let mut banks = [0u32; LANES];
        for lane in 0..LANES {
            banks[lane] = (mask >> lane & 1) << (addresses[lane] >> shift & (group as u64 - 1));
        }
        let mut extra = 0;
        for first in (0..LANES).step_by(group) {
            let part = (u32::MAX >> (LANES - group)) << first & mask;
            // Most often each lane has a bank of its own.
            let used = banks[first..first + group].iter().fold(0, |all, bank| all | bank);
            if used.count_ones() == part.count_ones() {
                continue;
            }
            let (mut depth, mut most) = ([0usize; LANES], 0);
            for lane in lanes(part) {
                let at = addresses[lane] >> shift;
                let bank = at as usize & (group - 1);
                if !self.banks[bank][..depth[bank]].contains(&at) {
                    self.banks[bank][depth[bank]] = at;
                    depth[bank] += 1;
                    most = most.max(depth[bank]);
                }
            }
            extra += most.saturating_sub(1) as u64;
        }
        self.conflicts[pc] += extra;
    }

    /// The sums by class.
    pub fn finish(&self, kernel: &Kernel, blocks: u64) -> Counters {
        let mut c = Counters {
            kernel: kernel.name.clone(),
            blocks,
            instructions: self.total(),
            divergent: self.divergent,
            atomics: self.atomics,
            sectors: self.sectors,
            ..Counters::default()
        };
        for (pc, i) in kernel.code.iter().enumerate() {
            let n = self.executed[pc];
            let shared = matches!(i.op, Op::Ldmatrix | Op::CpAsync) || i.space == Space::Shared;
            let global = i.op == Op::CpAsync
                || matches!(i.op, Op::Ld | Op::St | Op::Atomic)
                    && matches!(i.space, Space::Global | Space::Generic);
            c.shared += if shared { n } else { 0 };
            c.global += if global { n } else { 0 };
            c.float +=
                if i.ty.is_float() && !matches!(i.op, Op::Ld | Op::St | Op::Mov | Op::Mma) { n } else { 0 };
            match i.op {
                Op::Mma => {
                    c.tensor += n;
                    c.mma += n;
                }
                Op::Wgmma => {
                    c.tensor += n;
                    // A warp's 16 rows; `x` is half the columns.
                    c.mma += n * u64::from(i.x) / 4;
                }
                Op::Div
                | Op::Rem
                | Op::Sqrt
                | Op::Rcp
                | Op::Rsqrt
                | Op::Ex2
                | Op::Lg2
                | Op::Cvt
                | Op::CvtPack => {
                    c.slow += n;
                }
                Op::Bra => c.branches += n,
                Op::Bar | Op::BarWarp => c.barriers += n,
                Op::Fence | Op::FenceProxy => c.fences += n,
                Op::St | Op::Atomic => c.bytes_written += self.bytes[pc],
                _ => {}
            }
            if matches!(i.op, Op::Ld | Op::CpAsync) {
                c.bytes_read += self.bytes[pc];
                if i.op == Op::Ld && i.has(crate::ptx::program::flag::NC) {
                    c.bytes_streamed += self.bytes[pc];
                }
            }
            if self.conflicts[pc] > 0 {
                *c.conflicts.entry(kernel.lines[pc]).or_default() += self.conflicts[pc];
            }
        }
        c
    }
}

//! Gives registers rows of the register file. Registers that never hold a value at the same time share a row, so that a
//! warp's rows stay in the host's caches. Also finds registers that may be read before they are written.

use super::program::{ALWAYS, CONSTANT, Kernel, NONE, Op, RowAccess, Space, Ty, flag};
use super::rows::{is_register, rows};

/// A set of registers.
#[derive(Clone)]
struct Set(Vec<u64>);

impl Set {
    fn new(size: usize) -> Set {
        Set(vec![0; size.div_ceil(64)])
    }

    fn insert(&mut self, index: u32) {
        self.0[index as usize / 64] |= 1 << (index % 64);
    }

    fn contains(&self, index: u32) -> bool {
        self.0[index as usize / 64] >> (index % 64) & 1 == 1
    }

    fn each(&self) -> impl Iterator<Item = usize> {
        self.0.iter().enumerate().flat_map(|(word, bits)| {
            let mut bits = *bits;
            std::iter::from_fn(move || {
                let bit = bits.trailing_zeros() as usize;
                bits &= bits.wrapping_sub(1);
                (bit < 64).then_some(word * 64 + bit)
            })
        })
    }
}

/// A stretch of code that is entered at its start and left at its end.
struct Block {
    start: usize,
    end: usize,
    next: Vec<usize>,
    /// Read before a write in this block.
    reads: Set,
    /// Written by an instruction without a guard.
    writes: Set,
    live_in: Set,
    live_out: Set,
}

fn blocks(kernel: &mut Kernel, registers: usize) -> Vec<Block> {
    let code = &kernel.code;
    let mut starts = vec![false; code.len() + 1];
    starts[0] = true;
    for (pc, i) in code.iter().enumerate() {
        if i.op == Op::Bra {
            starts[i.x as usize] = true;
        }
        if matches!(i.op, Op::Bra | Op::Ret | Op::Trap) {
            starts[pc + 1] = true;
        }
    }
    let mut of = vec![0; code.len()];
    let mut ranges = Vec::new();
    for pc in 0..code.len() {
        if starts[pc] {
            ranges.push((pc, pc));
        }
        let last = ranges.len() - 1;
        ranges[last].1 = pc + 1;
        of[pc] = last;
    }
    let empty = Set::new(registers);
    let mut all = Vec::with_capacity(ranges.len());
    for (start, end) in ranges {
        let last = kernel.code[end - 1];
        let mut next = Vec::new();
        if last.op == Op::Bra {
            next.push(of[last.x as usize]);
        }
        if !matches!(last.op, Op::Bra | Op::Ret | Op::Trap) || last.guard != ALWAYS {
            next.push(of[end]);
        }
        let (mut reads, mut writes) = (empty.clone(), empty.clone());
        for pc in start..end {
            let i = &mut kernel.code[pc];
            let (op, guard) = (i.op, i.guard);
            let mut written = Vec::new();
            rows(i, &mut kernel.lists, |row, _, write| {
                if !is_register(*row) {
                    return;
                }
                if (!write || op == Op::Wgmma) && !writes.contains(*row) {
                    reads.insert(*row);
                }
                if write && guard == ALWAYS {
                    written.push(*row);
                }
            });
            for row in written {
                writes.insert(row);
            }
        }
        let (live_in, live_out) = (reads.clone(), empty.clone());
        all.push(Block { start, end, next, reads, writes, live_in, live_out });
    }
    all
}

fn liveness(blocks: &mut [Block]) {
    loop {
        let mut changed = false;
        for at in (0..blocks.len()).rev() {
            let mut out = std::mem::replace(&mut blocks[at].live_out, Set(Vec::new()));
            let mut grown = false;
            for next in 0..blocks[at].next.len() {
                for (to, from) in out.0.iter_mut().zip(&blocks[blocks[at].next[next]].live_in.0) {
                    grown |= from & !*to != 0;
                    *to |= from;
                }
            }
            let block = &mut blocks[at];
            if grown {
                for (index, live) in out.0.iter().enumerate() {
                    block.live_in.0[index] = block.reads.0[index] | (live & !block.writes.0[index]);
                }
                changed = true;
            }
            block.live_out = out;
        }
        if !changed {
            return;
        }
    }
}

/// First and last position of each register, and which may be read before they are written.
fn intervals(kernel: &mut Kernel, registers: usize) -> (Vec<Option<(usize, usize)>>, Set) {
    let mut blocks = blocks(kernel, registers);
    liveness(&mut blocks);
    let mut spans: Vec<Option<(usize, usize)>> = vec![None; registers];
    let mut extend = |register: usize, at: usize| {
        let span = spans[register].get_or_insert((at, at));
        *span = (span.0.min(at), span.1.max(at));
    };
    for block in &blocks {
        for register in block.live_in.each() {
            extend(register, block.start);
        }
        for register in block.live_out.each() {
            extend(register, block.end);
        }
        for pc in block.start..block.end {
            rows(&mut kernel.code[pc], &mut kernel.lists, |row, _, _| {
                if is_register(*row) {
                    extend(*row as usize, pc);
                }
            });
        }
    }
    let mut early = blocks.swap_remove(0).live_in;
    speculative(kernel, registers, &mut early);
    (spans, early)
}

/// Adds the registers that are loaded from shared memory by one instruction and only selected by one: the compiler moves
/// such a load in front of the condition under which its memory is written.
fn speculative(kernel: &mut Kernel, registers: usize, early: &mut Set) {
    // [register]: writes, loads among them, reads, selections among them.
    let mut counts = vec![[0u8; 4]; registers];
    for i in &mut kernel.code {
        let load = i.op == Op::Ld && i.space == Space::Shared && i.n == 1;
        let select = i.op == Op::Selp;
        rows(i, &mut kernel.lists, |row, _, write| {
            if is_register(*row) {
                let (at, those) = if write { (0, load) } else { (2, select) };
                let count = &mut counts[*row as usize];
                count[at] = count[at].saturating_add(1);
                count[at + 1] = count[at + 1].saturating_add(u8::from(those));
            }
        });
    }
    let found = (0..).zip(&counts).filter(|(_, count)| **count == [1; 4]);
    found.for_each(|(register, _)| early.insert(register));
}

/// A kernel whose operands are still registers.
#[derive(Debug)]
pub(super) struct Decoded {
    pub kernel: Kernel,
    /// The type of each register.
    pub registers: Vec<Ty>,
    /// The 32-bit registers of a thread at most.
    pub register_limit: u32,
}

impl Decoded {
    /// The kernel, ready to run.
    pub fn finish(&self) -> Kernel {
        let mut kernel = self.kernel.clone();
        allocate(&mut kernel, &self.registers);
        kernel.registers = kernel.registers.clamp(16, self.register_limit);
        kernel
    }
}

/// Rewrites the operands of a kernel from registers to rows.
fn allocate(kernel: &mut Kernel, registers: &[Ty]) {
    let (spans, early) = intervals(kernel, registers.len());
    let wide = |register: usize| registers[register].bytes() == 8;
    let mut order: Vec<usize> = (0..registers.len()).filter(|r| spans[*r].is_some()).collect();
    let span = |register: usize| spans[register].unwrap_or_default();
    order.sort_unstable_by_key(|r| span(*r));
    // Slots of 32 and of 64 bits: those free, and those in use by the end of their interval.
    let mut free = [Vec::new(), Vec::new()];
    let mut used = [0u32; 2];
    let mut ends = std::collections::BinaryHeap::new();
    let mut slot = vec![0u32; registers.len()];
    let (mut live, mut most) = (0, 0);
    for register in order {
        let (start, end) = span(register);
        while let Some(std::cmp::Reverse((last, other))) = ends.peek().copied()
            && last < start
        {
            ends.pop();
            live -= 1 + u32::from(wide(other));
            free[usize::from(wide(other))].push(slot[other]);
        }
        let kind = usize::from(wide(register));
        slot[register] = free[kind].pop().unwrap_or_else(|| {
            used[kind] += 1;
            used[kind] - 1
        });
        live += 1 + kind as u32;
        most = most.max(live);
        ends.push(std::cmp::Reverse((end, register)));
    }
    // 64-bit rows first, so that they are aligned.
    let row = |register: usize| {
        if wide(register) { slot[register] * 2 } else { used[1] * 2 + slot[register] }
    };
    let mut constant_rows = Vec::with_capacity(kernel.constants.len());
    let mut next = 0;
    for (_, wide) in &kernel.constants {
        constant_rows.push(next);
        next += 1 + u32::from(*wide);
    }
    kernel.rows = used[1] * 2 + used[0];
    kernel.registers = most + 8;
    kernel.accesses = vec![Vec::new(); kernel.code.len()];
    for pc in 0..kernel.code.len() {
        let mut accesses = Vec::new();
        rows(&mut kernel.code[pc], &mut kernel.lists, |operand, _, write| {
            *operand = match *operand {
                // Results that nobody reads go to the rows after the last.
                NONE if write => kernel.rows,
                NONE => return,
                constant if constant & CONSTANT != 0 => {
                    CONSTANT | constant_rows[(constant & !CONSTANT) as usize]
                }
                register => {
                    let early = early.contains(register);
                    kernel.tracked |= early;
                    if early || kernel.uses_wgmma {
                        accesses.push(RowAccess { row: row(register as usize), write, early });
                    }
                    row(register as usize)
                }
            };
        });
        if !accesses.is_empty() {
            kernel.code[pc].flags |= flag::TRACKED;
        }
        kernel.accesses[pc] = accesses;
    }
}

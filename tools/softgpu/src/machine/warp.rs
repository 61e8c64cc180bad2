//! The state of a warp: a program counter for each lane, registers, copies in flight.

use super::lanes::LANES;
use super::tensor::Products;
use crate::ptx::program::Kernel;

/// 64 aligned bytes.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Line(#[expect(dead_code, reason = "accessed through pointers")] [u32; 16]);

/// Rows filled with `value`, aligned for vector instructions.
pub(super) fn lines(rows: u32, value: u32) -> Vec<Line> {
    vec![Line([value; 16]); rows as usize * 2]
}

/// What a warp waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Ready,
    /// At a barrier of this number, for `threads` threads or all.
    Barrier {
        id: u32,
        threads: Option<u32>,
    },
    /// At `griddepcontrol.wait`.
    Dependents,
    Done,
}

/// One lane's asynchronous copy.
#[derive(Clone, Copy)]
pub(super) struct Copy {
    pub pc: u32,
    pub lane: u8,
    /// Bytes written, and how many are read from the source; the rest is zero.
    pub bytes: u8,
    pub read: u8,
    pub to: u32,
    pub from: *const u8,
    /// The lane's group.
    pub group: u32,
}

pub(super) struct Warp {
    pub index: usize,
    pub pcs: [u32; LANES],
    /// Lanes that have not returned.
    pub alive: u32,
    /// Lanes that wait at a `.sync` instruction for other lanes.
    pub waiting: u32,
    pub state: State,
    pub registers: Vec<Line>,
    pub predicates: Vec<u32>,
    /// [row]: lanes that have written it, for the rows of registers that may be read before they are written.
    pub written: Vec<u32>,
    pub copies: Vec<Copy>,
    /// [lane]: groups committed.
    pub groups: [u32; LANES],
    /// [lane][kernel.local]
    pub local: Vec<u8>,
    pub local_written: Vec<bool>,
    /// The instruction that is reported if something goes wrong.
    pub at: usize,
    /// Prefer lanes at or after this instruction: so that lanes that wait for others in a loop cannot starve them.
    pub favour: u32,
    /// Lanes that have executed `griddepcontrol.launch_dependents`.
    pub launched: u32,
    /// Whether `griddepcontrol.wait` was passed.
    pub waited: bool,
    pub products: Products,
}

impl Warp {
    /// A warp with `threads` threads at the start of a kernel.
    pub fn begin(&mut self, kernel: &Kernel, index: usize, threads: u32) {
        self.index = index;
        self.pcs = [0; LANES];
        self.alive = if threads >= 32 { u32::MAX } else { (1 << threads) - 1 };
        self.waiting = 0;
        self.state = State::Ready;
        // Two rows more, which take what nobody reads.
        let lines_needed = (kernel.rows as usize + 2) * 2;
        if self.registers.len() < lines_needed {
            self.registers = lines(kernel.rows + 2, 0xdead_beef);
        }
        self.predicates.clear();
        self.predicates.resize(kernel.predicates as usize, 0);
        self.written.clear();
        if kernel.tracked {
            self.written.resize(kernel.rows as usize + 2, 0);
        }
        self.copies.clear();
        self.groups = [0; LANES];
        self.local.resize(kernel.local as usize * LANES, 0);
        self.local_written.clear();
        self.local_written.resize(kernel.local as usize * LANES, false);
        self.at = 0;
        self.favour = 0;
        self.launched = 0;
        self.waited = false;
        self.products = Products::default();
    }

    pub fn new() -> Warp {
        Warp {
            index: 0,
            pcs: [0; LANES],
            alive: 0,
            waiting: 0,
            state: State::Done,
            registers: Vec::new(),
            predicates: Vec::new(),
            written: Vec::new(),
            copies: Vec::new(),
            groups: [0; LANES],
            local: Vec::new(),
            local_written: Vec::new(),
            at: 0,
            favour: 0,
            launched: 0,
            waited: false,
            products: Products::default(),
        }
    }

    /// Lanes of `among` at an instruction.
    #[inline(always)]
    pub fn lanes_at(&self, pc: u32, among: u32) -> u32 {
        let mut mask = 0;
        for lane in 0..LANES {
            mask |= u32::from(self.pcs[lane] == pc) << lane;
        }
        mask & among
    }

    /// The lowest instruction at or after `from` at which lanes of `among` are.
    #[inline(always)]
    pub fn lowest(&self, from: u32, among: u32) -> Option<u32> {
        let mut lowest = u32::MAX;
        for lane in 0..LANES {
            let candidate = among >> lane & 1 == 1 && self.pcs[lane] >= from;
            lowest = lowest.min(if candidate { self.pcs[lane] } else { u32::MAX });
        }
        (lowest != u32::MAX).then_some(lowest)
    }

    /// Moves lanes to an instruction.
    #[inline(always)]
    pub fn go(&mut self, mask: u32, pc: u32) {
        for lane in 0..LANES {
            if mask >> lane & 1 == 1 {
                self.pcs[lane] = pc;
            }
        }
    }
}

//! How much a pair takes of a device, before any of it is taken: what loads models and makes batches runs once on a
//! [`Ledger`], which only counts. So there is one list of allocations, and its sums are exact.

use crate::device::{Arg, Buffer, Device, Event, Graph, Kernel, Memory, Pinned, Properties};
use crate::load::Loader;
use crate::model::PAGE;
use crate::pair::Pair;
use crate::rounds::{Batch, Models};
use crate::{Error, Result};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a batch is to have room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    pub sequences: usize,
    pub block: usize,
    pub pages: usize,
    pub positions: usize,
}

impl Room {
    /// Every sequence can have `positions` positions at the same time.
    pub fn new(sequences: usize, block: usize, positions: usize) -> Room {
        Room { sequences, block, pages: sequences * positions.div_ceil(PAGE), positions }
    }
}

/// A line of a [`MemoryPlan`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    pub what: &'static str,
    pub bytes: usize,
}

/// What [`Models::load`] and [`Batch::new`] will allocate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryPlan {
    pub room: Room,
    pub lines: Vec<Line>,
    /// The lines of weights.
    weights: usize,
    /// Held beside the weights while they are loaded.
    pub passing: usize,
    /// Bytes that will be read from files.
    pub file_bytes: usize,
    /// Of a page's keys and values in all layers of target and drafter.
    pub page_bytes: usize,
    /// Page-locked memory of the host.
    pub pinned: usize,
    /// Number of allocations on the device. A GPU may round each one up, to 2 MiB at the most.
    pub allocations: usize,
}

impl MemoryPlan {
    /// # Errors
    /// What [`Models::load`] would refuse before it reads weights and [`Batch::new`], memory apart.
    pub fn new(pair: &Pair, room: Room) -> Result<MemoryPlan> {
        let ledger = Ledger::new();
        let mut lines = vec![];
        let mut loader = Loader::new(&ledger, &pair.target.weights);
        let models = Models::list(&mut loader, pair, room.positions, &mut |what| {
            let bytes = ledger.take().iter().map(|(_, bytes)| bytes).sum();
            lines.push(Line { what, bytes });
        })?;
        let weights = lines.iter().map(|line| line.bytes).sum();
        let (passing, file_bytes) = (loader.passing(), loader.file_bytes());
        Batch::new(&ledger, &models, room)?;
        let (mut keys, mut tables, mut workspaces, mut activations) = (0, 0, 0, 0);
        for (what, bytes) in ledger.take() {
            let group = match what.as_str() {
                "keys" | "values" => &mut keys,
                "the page table" => &mut tables,
                w if w.starts_with("partial ") || w.starts_with("counters ") => &mut workspaces,
                _ => &mut activations,
            };
            *group += bytes;
        }
        lines.push(Line { what: "keys and values", bytes: keys });
        lines.push(Line { what: "page tables", bytes: tables });
        lines.push(Line { what: "workspaces", bytes: workspaces });
        lines.push(Line { what: "activations and state", bytes: activations });
        let pinned = ledger.pinned_bytes();
        let page_bytes = keys / room.pages.max(1);
        let allocations = ledger.allocations();
        Ok(MemoryPlan { room, lines, weights, passing, file_bytes, page_bytes, pinned, allocations })
    }

    /// Bytes that stay allocated: the sum of the lines.
    pub fn total(&self) -> usize {
        self.lines.iter().map(|line| line.bytes).sum()
    }

    /// The most bytes that are allocated at any time.
    pub fn peak(&self) -> usize {
        self.total().max(self.weights + self.passing)
    }

    /// The most positions that every one of `sequences` sequences can have within `bytes` bytes, whole pages unless the
    /// models have fewer; 0 where not even one page fits.
    ///
    /// # Errors
    /// As [`MemoryPlan::new`].
    pub fn largest_context(pair: &Pair, sequences: usize, block: usize, bytes: usize) -> Result<usize> {
        let most = pair.target.config.stack.max_positions;
        let positions = |pages: usize| most.min(pages * PAGE);
        let with = |pages| MemoryPlan::new(pair, Room::new(sequences, block, positions(pages)));
        if with(1)?.peak() > bytes {
            return Ok(0);
        }
        // A number of pages that fits, and one that does not or is not wanted.
        let (mut fits, mut over) = (1, most.div_ceil(PAGE) + 1);
        while over - fits > 1 {
            let middle = fits.midpoint(over);
            // An error here is a context longer than the kernels take.
            match with(middle).is_ok_and(|plan| plan.peak() <= bytes) {
                true => fits = middle,
                false => over = middle,
            }
        }
        Ok(positions(fits))
    }
}

/// A device without memory: it counts what is allocated; copies and launches do nothing.
pub struct Ledger {
    properties: Properties,
    taken: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    /// What for, and bytes, since somebody looked.
    new: Vec<(String, usize)>,
    allocations: usize,
    /// Where the next allocation begins.
    end: u64,
    pinned: usize,
}

struct Nothing;

impl Memory for Nothing {}

/// Page-locked memory in name only.
struct Host {
    _words: Vec<u64>,
}

impl Memory for Host {}

impl Ledger {
    pub fn new() -> Ledger {
        let properties = Properties {
            name: "ledger".to_string(),
            capability: (8, 0),
            multiprocessors: 1,
            memory: u64::MAX,
            l2: 0,
            shared_per_block: u32::MAX,
            driver: 0,
            overlap: false,
        };
        Ledger { properties, taken: Mutex::default() }
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What has been allocated since the last call, whether given back or not: what for, and bytes.
    pub fn take(&self) -> Vec<(String, usize)> {
        std::mem::take(&mut self.taken().new)
    }

    /// Allocations so far.
    pub fn allocations(&self) -> usize {
        self.taken().allocations
    }

    /// Bytes of [`Device::pinned`] so far.
    pub fn pinned_bytes(&self) -> usize {
        self.taken().pinned
    }
}

impl Default for Ledger {
    fn default() -> Ledger {
        Ledger::new()
    }
}

fn nothing<T>(what: &str) -> Result<T> {
    Err(Error::Internal(format!("{what} of a device that only counts memory")))
}

impl Device for Ledger {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn allocate(&self, bytes: usize, what: &str) -> Result<Buffer> {
        let mut taken = self.taken();
        let address = taken.end;
        let end = address.checked_add(bytes as u64).and_then(|end| end.checked_next_multiple_of(256));
        taken.end = end.ok_or_else(|| {
            Error::Memory(format!("no memory for {what}: {bytes} bytes are more than any device has"))
        })?;
        taken.new.push((what.to_string(), bytes));
        taken.allocations += 1;
        Ok(Buffer::new(address, bytes, Arc::new(Nothing)))
    }

    fn pinned(&self, bytes: usize, _what: &str) -> Result<Pinned> {
        self.taken().pinned += bytes;
        let mut words = vec![0u64; bytes.div_ceil(8)];
        let host = words.as_mut_ptr().cast();
        Ok(Pinned { host, buffer: Buffer::new(0, bytes, Arc::new(Host { _words: words })) })
    }

    fn memory(&self) -> Result<(u64, u64)> {
        Ok((u64::MAX - self.taken().end, u64::MAX))
    }

    fn upload(&self, _to: &Buffer, _bytes: &[u8]) -> Result<()> {
        Ok(())
    }

    fn download(&self, _from: &Buffer, _bytes: &mut [u8]) -> Result<()> {
        nothing("a download")
    }

    fn copy(&self, _to: &Buffer, _from: &Buffer) -> Result<()> {
        Ok(())
    }

    fn fill(&self, _to: &Buffer, _byte: u8) -> Result<()> {
        Ok(())
    }

    fn seal(&self, _constant: &Buffer) {}

    fn launch(&self, _kernel: &'static Kernel, _grid: [u32; 3], _shared: u32, _args: &[Arg]) -> Result<()> {
        Ok(())
    }

    fn capture(&self, record: &mut dyn FnMut() -> Result<()>) -> Result<Graph> {
        record()?;
        Ok(Graph { nodes: vec![], replayable: Box::new(()) })
    }

    fn replay(&self, _graph: &Graph) -> Result<()> {
        Ok(())
    }

    fn record(&self) -> Result<Event> {
        nothing("an event")
    }

    fn elapsed(&self, _from: &Event, _to: &Event) -> Result<f32> {
        nothing("the time")
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}

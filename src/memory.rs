//! What a pair holds on a device, allocated in one order by one function: on a device, or on a [`Ledger`] that only
//! counts. Its sizes are therefore known before the first byte of weights is read, and exact.

use crate::config;
use crate::device::{Arg, Buffer, Device, Event, Graph, Kernel, Memory, Pinned, Properties};
use crate::load::Loader;
use crate::model::{Cache, Injection, PAGE, Scratch, Sizes, Stack, Vocabulary};
use crate::pair::Pair;
use crate::{Error, Result};
use std::sync::{Arc, Mutex, PoisonError};

/// What passes over a pair have room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    pub sequences: usize,
    /// Pages that each of them may have.
    pub sequence_pages: usize,
    /// Pages there are, for target and drafter each.
    pub pages: usize,
    /// Rows of a draft or verification block.
    pub block: usize,
    /// Rows of a prompt's chunk.
    pub chunk: usize,
}

impl Room {
    /// Every sequence can have `positions` positions at the same time.
    pub fn new(sequences: usize, positions: usize, block: usize, chunk: usize) -> Room {
        let sequence_pages = positions.div_ceil(PAGE);
        Room { sequences, sequence_pages, pages: sequences * sequence_pages, block, chunk }
    }

    /// That a sequence can have.
    pub fn positions(&self) -> usize {
        self.sequence_pages * PAGE
    }
}

/// A stack with its pages and what its passes work in.
pub struct Part {
    pub stack: Stack,
    pub cache: Cache,
    pub scratch: Scratch,
}

/// All of a pair that stays on a device.
pub struct Resident {
    pub target: Part,
    pub vocabulary: Vocabulary,
    pub drafter: Option<(Part, Injection)>,
}

impl Resident {
    /// Loads a pair. All memory is allocated before anything is read.
    ///
    /// # Errors
    /// [`Error::Memory`] where there is too little; else as [`Stack::load`] and [`Loader::run`].
    pub fn load(
        device: &dyn Device,
        pair: &Pair,
        room: Room,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Resident> {
        let mut loader = Loader::new(device, &pair.target.weights);
        let resident = Resident::allocate(&mut loader, device, pair, room, &mut |_, _| ())?;
        loader.run(progress)?;
        Ok(resident)
    }

    /// `took(what, bytes)` says what has been allocated since the last call, or that many bytes of it.
    fn allocate<'a>(
        loader: &mut Loader<'a>,
        device: &dyn Device,
        pair: &'a Pair,
        room: Room,
        took: &mut dyn FnMut(&'static str, Option<usize>),
    ) -> Result<Resident> {
        let t = &pair.target.config;
        let stack = Stack::load(loader, "model.", &t.stack, room.positions())?;
        took("target weights", None);
        let vocabulary = Vocabulary::load(loader, t)?;
        took("vocabulary", None);
        let drafter = match &pair.drafter {
            None => None,
            Some(model) => {
                let d = &model.config;
                loader.turn_to(&model.weights);
                let stack = Stack::load(loader, "", &d.stack, room.positions())?;
                let injection = Injection::load(loader, t.stack.hidden, d.taps.len())?;
                took("drafter weights", None);
                Some((stack, injection, d.taps.len() * t.stack.hidden))
            }
        };
        let cache = |c| Cache::new(device, c, room.pages, room.sequences, room.sequence_pages);
        let target_cache = cache(&t.stack)?;
        took("target keys and values", None);
        let drafter = match drafter {
            None => None,
            Some((stack, injection, features)) => {
                let cache = cache(&stack.config)?;
                took("drafter keys and values", None);
                Some((stack, injection, features, cache))
            }
        };
        let Room { sequences, block, chunk, .. } = room;
        let head = Some(vocabulary.shape());
        let sizes = Sizes { sequences, block, chunk, injected: 0, head, features: None };
        let scratch = Scratch::new(device, &t.stack, &target_cache, sizes)?;
        took("target workspaces", Some(scratch.workspace_bytes()));
        took("target activations", None);
        let target = Part { stack, cache: target_cache, scratch };
        let drafter = match drafter {
            None => None,
            Some((stack, injection, features, cache)) => {
                let sizes = Sizes { injected: sequences * block, features: Some(features), ..sizes };
                let scratch = Scratch::new(device, &stack.config, &cache, sizes)?;
                took("drafter workspaces", Some(scratch.workspace_bytes()));
                took("drafter activations", None);
                Some((Part { stack, cache, scratch }, injection))
            }
        };
        Ok(Resident { target, vocabulary, drafter })
    }
}

/// A line of a [`MemoryPlan`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    pub what: &'static str,
    pub bytes: usize,
}

/// What [`Resident::load`] will allocate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryPlan {
    pub room: Room,
    /// In order of allocation.
    pub lines: Vec<Line>,
    /// Held only while weights are loaded.
    pub passing: usize,
    /// Bytes that will be read from files.
    pub file_bytes: usize,
    /// Of one page's keys and values in all layers of target and drafter.
    pub page_bytes: usize,
    /// Number of allocations. A GPU may round each one up, to 2 MiB at the most.
    pub allocations: usize,
}

impl MemoryPlan {
    /// # Errors
    /// What [`Resident::load`] would refuse without reading weights, memory apart.
    pub fn new(pair: &Pair, room: Room) -> Result<MemoryPlan> {
        let ledger = Ledger::new();
        let mut lines = vec![];
        let mut seen = 0;
        let mut loader = Loader::new(&ledger, &pair.target.weights);
        let resident = Resident::allocate(&mut loader, &ledger, pair, room, &mut |what, bytes| {
            let bytes = bytes.unwrap_or_else(|| ledger.bytes() - seen);
            seen += bytes;
            lines.push(Line { what, bytes });
        })?;
        let page = |c: &config::Stack| 2 * c.attention.len() * Cache::page_bytes(c);
        let drafter = resident.drafter.as_ref().map_or(0, |(part, _)| page(&part.stack.config));
        Ok(MemoryPlan {
            room,
            lines,
            passing: loader.passing(),
            file_bytes: loader.file_bytes(),
            page_bytes: page(&resident.target.stack.config) + drafter,
            allocations: ledger.allocations(),
        })
    }

    /// A further line: what `allocate` takes.
    ///
    /// # Errors
    /// What `allocate` returned.
    pub fn measure<T>(
        &mut self,
        what: &'static str,
        allocate: impl FnOnce(&dyn Device) -> Result<T>,
    ) -> Result<()> {
        let ledger = Ledger::new();
        allocate(&ledger)?;
        self.allocations += ledger.allocations();
        self.lines.push(Line { what, bytes: ledger.bytes() });
        Ok(())
    }

    /// Bytes that stay allocated: the sum of the lines.
    pub fn total(&self) -> usize {
        self.lines.iter().map(|line| line.bytes).sum()
    }

    /// The most bytes that are allocated at any time.
    pub fn peak(&self) -> usize {
        self.total() + self.passing
    }

    /// The most positions that every sequence of `room` can have within `bytes` bytes, whole pages unless the models
    /// have fewer; 0 where not even one page fits.
    ///
    /// # Errors
    /// As [`MemoryPlan::new`].
    pub fn largest_context(pair: &Pair, room: Room, bytes: usize) -> Result<usize> {
        let with = |pages: usize| {
            let room = Room { sequence_pages: pages, pages: room.sequences * pages, ..room };
            MemoryPlan::new(pair, room)
        };
        let stacks = [Some(&pair.target.config.stack), pair.drafter.as_ref().map(|d| &d.config.stack)];
        let most = stacks.into_iter().flatten().map(|c| c.max_positions).min().unwrap_or(0);
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
        Ok(most.min(fits * PAGE))
    }
}

/// A device without memory: it counts what is allocated, and copies and launches do nothing.
pub struct Ledger {
    properties: Properties,
    /// (allocations, bytes)
    taken: Mutex<(usize, usize)>,
}

struct Nothing;

impl Memory for Nothing {}

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

    fn taken(&self) -> (usize, usize) {
        *self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes allocated so far, those given back included.
    pub fn bytes(&self) -> usize {
        self.taken().1
    }

    /// Allocations so far, as [`Ledger::bytes`].
    pub fn allocations(&self) -> usize {
        self.taken().0
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
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let sum = taken.1.checked_add(bytes).ok_or_else(|| {
            Error::Memory(format!("no memory for {what}: {bytes} bytes are more than any device has"))
        })?;
        *taken = (taken.0 + 1, sum);
        Ok(Buffer::new(0, bytes, Arc::new(Nothing)))
    }

    /// The host's memory, so not counted; no byte of it can be read.
    fn pinned(&self, _bytes: usize, _what: &str) -> Result<Pinned> {
        Ok(Pinned { host: std::ptr::null_mut(), buffer: Buffer::new(0, 0, Arc::new(Nothing)) })
    }

    fn memory(&self) -> Result<(u64, u64)> {
        Ok((u64::MAX - self.bytes() as u64, u64::MAX))
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

    fn capture(&self, _record: &mut dyn FnMut() -> Result<()>) -> Result<Graph> {
        nothing("a graph")
    }

    fn replay(&self, _graph: &Graph) -> Result<()> {
        nothing("a replay")
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

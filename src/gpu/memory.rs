//! How much a pair takes of a device, before any of it is taken: what loads models and makes batches runs once on a
//! [`Ledger`], which only counts. So there is one list of allocations, and its sums are exact.

use crate::checkpoint::pair::Pair;
use crate::gpu::decoder::{Batch, Models};
use crate::gpu::device::{
    Arg, Buffer, Device, Event, Graph, Kernel, Launch, Memory, Node, Pinned, Properties, check_launch,
};
use crate::gpu::kernels::attention;
use crate::gpu::loader::Loader;
use crate::gpu::model::PAGE;
use crate::spec::config::{SpecConfig, VerifyMethod};
use crate::spec::draft_length::DraftLengthPolicy;
use crate::spec::tree::MOST_ROWS;
use crate::{Error, Result};
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

/// What a batch is to have room for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BatchConfig {
    pub sequences: usize,
    pub block: usize,
    pub pages: usize,
    pub positions: usize,
    /// Rows of a tree at most; 0: rounds verify chains only.
    pub tree: usize,
    /// Drafts may be judged by other rules than `match`, which takes the drafter's logits beside the target's.
    pub rules: bool,
    /// Rounds may be of several sizes, down to AR steps that the drafter follows.
    pub adaptive: bool,
}

impl BatchConfig {
    /// Every sequence can have `positions` positions at the same time.
    pub fn new(sequences: usize, block: usize, positions: usize) -> BatchConfig {
        let pages = sequences.saturating_mul(positions.div_ceil(PAGE));
        BatchConfig { sequences, block, pages, positions, tree: 0, rules: false, adaptive: false }
    }

    /// The same for trees of up to `rows` rows, which take slots behind the positions that they stand for.
    pub fn with_trees(self, rows: usize) -> BatchConfig {
        let pages = self.sequences.saturating_mul((self.positions + rows).div_ceil(PAGE));
        BatchConfig { pages, tree: rows, ..self }
    }

    /// The same for requests with this configuration.
    pub fn for_spec(self, spec: &SpecConfig) -> BatchConfig {
        BatchConfig {
            rules: spec.method() != VerifyMethod::Match,
            adaptive: spec.draft_length() != DraftLengthPolicy::Full,
            ..self.with_trees(spec.tree_rows().unwrap_or(0))
        }
    }

    /// Rows that a round verifies of a sequence at most.
    pub fn max_verify_rows(&self) -> usize {
        self.block.max(self.tree)
    }

    /// Pages that one sequence may have.
    pub fn sequence_pages(&self) -> usize {
        (self.positions + self.tree).div_ceil(PAGE)
    }

    /// As [`BatchConfig::new`]: sequences of `--ctx` positions, or of 8192, or of the `needed` ones of the longest request.
    ///
    /// # Errors
    /// As [`Pair::context`].
    pub fn of(
        pair: &Pair,
        sequences: usize,
        block: usize,
        ctx: Option<usize>,
        needed: usize,
    ) -> Result<BatchConfig> {
        let most = pair.context(ctx)?;
        let positions = if ctx.is_some() { most } else { most.min(needed.max(8192)) };
        Ok(BatchConfig::new(sequences, block, positions))
    }

    /// # Errors
    /// [`Error::Unsupported`] for more than the kernels can run together, named by its flag.
    pub fn check(&self) -> Result<()> {
        let BatchConfig { sequences, block, positions, tree, .. } = *self;
        let wrong = |flag, found, expected| {
            Err(Error::Unsupported(format!("the kernels cannot run --{flag} {found}: expected {expected}")))
        };
        let most = attention::MOST_SLOTS;
        match (sequences, block, positions) {
            (0, ..) | (1025.., ..) => wrong("batch", sequences, "1 to 1024".to_string()),
            (_, 0 | 65.., _) => wrong("block", block, "1 to 64".to_string()),
            _ if tree > MOST_ROWS => wrong("tree", tree, format!("at most {MOST_ROWS}")),
            _ if sequences * self.max_verify_rows() > 65535 => {
                let wide = self.max_verify_rows();
                wrong("batch", sequences, format!("at most {} in blocks of {wide}", 65535 / wide))
            }
            _ if positions == 0 || positions > most - tree => {
                wrong("ctx", positions, format!("1 to {}", most - tree))
            }
            _ => Ok(()),
        }
    }
}

/// A line of a [`MemoryPlan`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    pub what: &'static str,
    pub bytes: usize,
}

/// What a device may take beyond the bytes it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overhead {
    /// Bytes to whose multiples it rounds an allocation up.
    pub granule: usize,
    /// Bytes it takes for itself, later.
    pub reserve: usize,
}

impl Overhead {
    /// The emulator's.
    pub const NONE: Overhead = Overhead { granule: 1, reserve: 0 };
    /// A GPU's at the most. Drivers give out memory in pieces of 2 MiB, of which small allocations share one; the reserve
    /// is for graphs, for the local memory of kernels and for other programs.
    pub const GPU: Overhead = Overhead { granule: 2 << 20, reserve: 256 << 20 };
}

/// What [`Models::load`] and [`Batch::new`] will allocate. As text it is a table.
#[derive(Debug, Clone, PartialEq)]
pub struct MemoryPlan {
    pub room: BatchConfig,
    pub lines: Vec<Line>,
    /// Bytes of each allocation on the device, those for weights first.
    sizes: Vec<usize>,
    /// How many are for weights.
    weights: usize,
    /// Held beside the weights while they are loaded.
    pub passing: usize,
    /// Bytes that will be read from files.
    pub file_bytes: usize,
    /// Of a page's keys and values in all layers of target and drafter.
    pub page_bytes: usize,
    /// Page-locked memory of the host.
    pub pinned: usize,
}

impl MemoryPlan {
    /// # Errors
    /// As [`BatchConfig::check`], and what [`Models::load`] would refuse before it reads weights, memory apart.
    pub fn new(pair: &Pair, room: BatchConfig) -> Result<MemoryPlan> {
        room.check()?;
        let ledger = Ledger::new();
        let (mut lines, mut sizes) = (vec![], vec![]);
        let mut loader = Loader::new(&ledger, &pair.target.weights);
        let models = Models::list(&mut loader, pair, room.positions, &mut |what| {
            let taken: Vec<usize> = ledger.take().into_iter().map(|(_, bytes)| bytes).collect();
            lines.push(Line { what, bytes: taken.iter().sum() });
            sizes.extend(taken);
        })?;
        let weights = sizes.len();
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
            sizes.push(bytes);
        }
        lines.push(Line { what: "keys and values", bytes: keys });
        lines.push(Line { what: "page tables", bytes: tables });
        lines.push(Line { what: "workspaces", bytes: workspaces });
        lines.push(Line { what: "activations and state", bytes: activations });
        let pinned = ledger.pinned_bytes();
        let page_bytes = keys / room.pages.max(1);
        Ok(MemoryPlan { room, lines, sizes, weights, passing, file_bytes, page_bytes, pinned })
    }

    /// Number of allocations on the device.
    pub fn allocations(&self) -> usize {
        self.sizes.len()
    }

    /// Bytes that stay allocated: the sum of the lines.
    pub fn total(&self) -> usize {
        self.sizes.iter().sum()
    }

    /// The most bytes that are allocated while weights are loaded, before the rest.
    pub fn loading(&self) -> usize {
        self.sizes[..self.weights].iter().sum::<usize>() + self.passing
    }

    /// The most bytes that are allocated at any time.
    pub fn peak(&self) -> usize {
        self.total().max(self.loading())
    }

    /// Bytes that must be free on a device for all of it, page-locked memory included, which some have no other place for.
    pub fn needed(&self, overhead: Overhead) -> usize {
        let Overhead { granule, reserve } = overhead;
        let round =
            |sizes: &[usize]| sizes.iter().map(|bytes| bytes.next_multiple_of(granule)).sum::<usize>();
        // What passes is two allocations.
        let loading = round(&self.sizes[..self.weights]) + self.passing + 2 * (granule - 1);
        loading.max(round(&self.sizes) + self.pinned) + reserve
    }

    /// Whether all of it fits into `free` bytes.
    ///
    /// # Errors
    /// [`Error::Memory`] where not, with the largest `--ctx` that does; else as [`MemoryPlan::new`].
    pub fn check(&self, pair: &Pair, free: usize, overhead: Overhead) -> Result<()> {
        let needed = self.needed(overhead);
        if needed <= free {
            return Ok(());
        }
        let advice = match MemoryPlan::largest_context(pair, self.room, free, overhead)? {
            0 => format!("not even {PAGE} positions of each fit"),
            most => format!("the largest --ctx that fits is {most}"),
        };
        Err(Error::Memory(format!(
            "not enough memory on the device for {}: {} are needed, {} are free; {advice}",
            self.room,
            size(needed),
            size(free)
        )))
    }

    /// The most positions that every one of as many sequences as `room` has can have within `free` bytes, whole pages
    /// unless the models have fewer; 0 where not even one page fits.
    ///
    /// # Errors
    /// As [`MemoryPlan::new`].
    pub fn largest_context(pair: &Pair, room: BatchConfig, free: usize, overhead: Overhead) -> Result<usize> {
        let most = pair.target.config.stack.max_positions;
        let positions = |pages: usize| most.min(pages * PAGE);
        let with = |pages| {
            let BatchConfig { rules, adaptive, .. } = room;
            let sized = BatchConfig::new(room.sequences, room.block, positions(pages)).with_trees(room.tree);
            MemoryPlan::new(pair, BatchConfig { rules, adaptive, ..sized })
        };
        if with(1)?.needed(overhead) > free {
            return Ok(0);
        }
        // A number of pages that fits, and one that does not or is not wanted.
        let (mut fits, mut over) = (1, most.div_ceil(PAGE) + 1);
        while over - fits > 1 {
            let middle = fits.midpoint(over);
            // An error here is a context longer than the kernels take.
            match with(middle).is_ok_and(|plan| plan.needed(overhead) <= free) {
                true => fits = middle,
                false => over = middle,
            }
        }
        Ok(positions(fits))
    }
}

/// As in "memory for ...".
impl fmt::Display for BatchConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let BatchConfig { sequences, block, positions, .. } = self;
        let plural = if *sequences == 1 { "" } else { "s" };
        write!(f, "{sequences} sequence{plural} of {positions} positions in blocks of {block}")?;
        if self.tree > 0 { write!(f, " and trees of {}", self.tree) } else { Ok(()) }
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "memory for {}:", self.room)?;
        let sums = [
            ("in all", self.total()),
            ("at most while loading", self.loading()),
            ("to be free on a GPU", self.needed(Overhead::GPU)),
            ("page-locked on the host", self.pinned),
        ];
        let lines = self.lines.iter().map(|line| (line.what, line.bytes));
        for (what, bytes) in lines.chain(sums) {
            writeln!(f, "  {what:24} {bytes:>14} bytes {:>12}", units(bytes))?;
        }
        let (pages, bytes) = (self.room.pages, self.page_bytes);
        write!(f, "pages of keys and values: {pages} of {bytes} bytes, {} a position", bytes / PAGE)
    }
}

/// Bytes in KiB, MiB from 1 on, or GiB from 10 on.
pub fn units(bytes: usize) -> String {
    match bytes >> 20 {
        0 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        1..10240 => format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64),
        _ => format!("{:.1} GiB", bytes as f64 / (1 << 30) as f64),
    }
}

/// Bytes, and the same in larger units.
pub fn size(bytes: usize) -> String {
    format!("{bytes} bytes ({})", units(bytes))
}

/// A device without memory: it counts what is allocated and captures graphs; copies and launches do nothing.
pub struct Ledger {
    properties: Properties,
    taken: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    /// What for, and bytes, since somebody looked.
    new: Vec<(String, usize)>,
    /// Where the next allocation begins.
    end: u64,
    pinned: usize,
    /// The steps of each thread that captures a graph.
    recording: HashMap<ThreadId, Vec<Node>>,
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
            pci: None,
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

    /// Adds a step to the graph that this thread captures, if it does.
    fn step(&self, node: Node) {
        if let Some(nodes) = self.taken().recording.get_mut(&thread::current().id()) {
            nodes.push(node);
        }
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

    fn copy(&self, to: &Buffer, from: &Buffer) -> Result<()> {
        self.step(Node::Copy { to: to.clone(), from: from.clone() });
        Ok(())
    }

    fn fill(&self, to: &Buffer, byte: u8) -> Result<()> {
        self.step(Node::Fill { to: to.clone(), byte });
        Ok(())
    }

    fn seal(&self, _constant: &Buffer) {}

    fn launch(&self, kernel: &'static Kernel, grid: [u32; 3], shared: u32, args: &[Arg]) -> Result<()> {
        check_launch(kernel, grid, shared)?;
        self.step(Node::Launch(Launch { kernel, grid, shared, args: args.to_vec() }));
        Ok(())
    }

    fn capture(&self, record: &mut dyn FnMut() -> Result<()>) -> Result<Graph> {
        let thread = thread::current().id();
        self.taken().recording.insert(thread, vec![]);
        let result = record();
        let nodes = self.taken().recording.remove(&thread).unwrap_or_default();
        result.map(|()| Graph { nodes, replayable: Box::new(()) })
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

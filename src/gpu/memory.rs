//! The memory plan of a pair: how many bytes it needs on a device, computed before anything is allocated.
//!
//! The code that loads models and makes batches runs once on a [`DryRunDevice`], which only counts. The plan
//! therefore has exactly the allocations of a real run.

use crate::checkpoint::pair::Pair;
use crate::gpu::batch_config::BatchConfig;
use crate::gpu::decoder::{Batch, Models};
use crate::gpu::dry_run::DryRunDevice;
use crate::gpu::kernels::PAGE;
use crate::gpu::loader::Loader;
use crate::{Error, Result};
use std::fmt;

/// One line of a [`MemoryPlan`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// What the memory is for.
    pub what: &'static str,
    /// Its size.
    pub bytes: usize,
}

/// Memory that a device uses beyond the requested bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overhead {
    /// Each allocation is rounded up to a multiple of this many bytes.
    pub granule: usize,
    /// Bytes that the device and its driver allocate later for themselves.
    pub reserve: usize,
}

impl Overhead {
    /// No overhead.
    pub const NONE: Overhead = Overhead { granule: 1, reserve: 0 };
    /// An upper bound for a GPU. The driver hands out memory in pieces of 2 MiB, which small allocations
    /// share; the reserve is for graphs, for the kernels' local memory and for other programs.
    pub const GPU: Overhead = Overhead { granule: 2 << 20, reserve: 256 << 20 };
}

/// The allocations of [`Models::load`] and [`Batch::new`]. Its `Display` is a table.
#[derive(Debug, Clone, PartialEq)]
pub struct MemoryPlan {
    /// The capacity of the planned batch.
    pub config: BatchConfig,
    /// The permanent allocations, grouped by purpose.
    pub lines: Vec<Line>,
    /// Bytes of each device allocation, weights first.
    sizes: Vec<usize>,
    /// How many of `sizes` are weights.
    weights: usize,
    /// Bytes of staging buffers, which exist only while the weights are loaded.
    pub staging: usize,
    /// Bytes that loading reads from files.
    pub file_bytes: usize,
    /// Bytes of one page: keys and values of [`PAGE`] positions in all layers of target and drafter.
    pub page_bytes: usize,
    /// Bytes of page-locked host memory.
    pub pinned: usize,
}

impl MemoryPlan {
    /// Plans `pair` with a batch of capacity `config`.
    ///
    /// # Errors
    /// As [`BatchConfig::check`], and every refusal of [`Models::load`] that needs neither weights nor
    /// memory.
    pub fn new(pair: &Pair, config: BatchConfig) -> Result<MemoryPlan> {
        config.check()?;
        let device = DryRunDevice::new();
        let (mut lines, mut sizes) = (vec![], vec![]);
        let mut loader = Loader::new(&device, &pair.target.weights);
        let models = Models::list(&mut loader, pair, config.positions, &mut |what| {
            let group: Vec<usize> = device.take().into_iter().map(|(_, bytes)| bytes).collect();
            lines.push(Line { what, bytes: group.iter().sum() });
            sizes.extend(group);
        })?;
        let weights = sizes.len();
        let (staging, file_bytes) = (loader.staging_bytes(), loader.file_bytes());
        Batch::new(&device, &models, config)?;
        let (mut keys, mut tables, mut workspaces, mut activations, mut states) = (0, 0, 0, 0, 0);
        for (what, bytes) in device.take() {
            let group = match what.as_str() {
                "keys" | "values" => &mut keys,
                "the page table" => &mut tables,
                "recurrent states" => &mut states,
                w if w.starts_with("partial ") || w.starts_with("counters ") => &mut workspaces,
                _ => &mut activations,
            };
            *group += bytes;
            sizes.push(bytes);
        }
        lines.push(Line { what: "keys and values", bytes: keys });
        lines.extend((states > 0).then_some(Line { what: "recurrent states", bytes: states }));
        lines.push(Line { what: "page tables", bytes: tables });
        lines.push(Line { what: "workspaces", bytes: workspaces });
        lines.push(Line { what: "activations and state", bytes: activations });
        let pinned = device.pinned_bytes();
        let page_bytes = keys / config.pages.max(1);
        Ok(MemoryPlan { config, lines, sizes, weights, staging, file_bytes, page_bytes, pinned })
    }

    /// Number of allocations on the device.
    pub fn allocations(&self) -> usize {
        self.sizes.len()
    }

    /// Bytes of the permanent allocations: the sum of the lines.
    pub fn total(&self) -> usize {
        self.sizes.iter().sum()
    }

    /// Peak bytes while weights are loaded, before the batch is allocated.
    pub fn loading(&self) -> usize {
        self.sizes[..self.weights].iter().sum::<usize>() + self.staging
    }

    /// Peak bytes at any time.
    pub fn peak(&self) -> usize {
        self.total().max(self.loading())
    }

    /// Bytes that must be free on a device. Page-locked host memory is included, in case it is the same memory.
    pub fn needed(&self, overhead: Overhead) -> usize {
        let Overhead { granule, reserve } = overhead;
        let round_up =
            |sizes: &[usize]| sizes.iter().map(|bytes| bytes.next_multiple_of(granule)).sum::<usize>();
        // The staging memory is two allocations.
        let loading = round_up(&self.sizes[..self.weights]) + self.staging + 2 * (granule - 1);
        loading.max(round_up(&self.sizes) + self.pinned) + reserve
    }

    /// Checks that the plan fits into `free` bytes.
    ///
    /// # Errors
    /// [`Error::Memory`] if it does not fit; the error names the longest context that fits. Otherwise as
    /// [`MemoryPlan::new`].
    pub fn check(&self, pair: &Pair, free: usize, overhead: Overhead) -> Result<()> {
        let needed = self.needed(overhead);
        if needed <= free {
            return Ok(());
        }
        let advice = match MemoryPlan::largest_context(pair, self.config, free, overhead)? {
            0 => format!("not even {PAGE} positions of each sequence fit"),
            positions => format!("the largest context that fits is {positions}"),
        };
        Err(Error::Memory(format!(
            "not enough memory on the device for {}: {} are needed, {} are free; {advice}",
            self.config,
            size(needed),
            size(free)
        )))
    }

    /// The most positions per sequence that fit into `free` bytes, with everything else as in `config`: whole
    /// pages, or the models' maximum if that is less. 0 if not even one page per sequence fits.
    ///
    /// # Errors
    /// As [`MemoryPlan::new`].
    pub fn largest_context(
        pair: &Pair,
        config: BatchConfig,
        free: usize,
        overhead: Overhead,
    ) -> Result<usize> {
        let limit = pair.target.config.stack.max_positions;
        let positions = |pages: usize| limit.min(pages * PAGE);
        let plan = |pages| {
            let BatchConfig { draft_probs, adaptive, .. } = config;
            let sized =
                BatchConfig::new(config.sequences, config.block, positions(pages)).with_trees(config.tree);
            MemoryPlan::new(pair, BatchConfig { draft_probs, adaptive, ..sized })
        };
        if plan(1)?.needed(overhead) > free {
            return Ok(0);
        }
        // Bisection: `fits` pages fit; `over` pages do not, or are more than the models can use.
        let (mut fits, mut over) = (1, limit.div_ceil(PAGE) + 1);
        while over - fits > 1 {
            let middle = fits.midpoint(over);
            // An error means that the context is longer than the kernels support.
            match plan(middle).is_ok_and(|plan| plan.needed(overhead) <= free) {
                true => fits = middle,
                false => over = middle,
            }
        }
        Ok(positions(fits))
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "memory for {}:", self.config)?;
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
        let (pages, bytes) = (self.config.pages, self.page_bytes);
        write!(f, "pages of keys and values: {pages} of {bytes} bytes, {} a position", bytes / PAGE)
    }
}

/// `bytes` in KiB below 1 MiB, in MiB below 10 GiB, otherwise in GiB.
pub fn units(bytes: usize) -> String {
    match bytes >> 20 {
        0 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        1..10240 => format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64),
        _ => format!("{:.1} GiB", bytes as f64 / (1 << 30) as f64),
    }
}

/// `bytes` exactly, followed by [`units`] in parentheses.
pub fn size(bytes: usize) -> String {
    format!("{bytes} bytes ({})", units(bytes))
}

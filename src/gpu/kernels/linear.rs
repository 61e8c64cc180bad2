//! What the linear kernels (`cuda/model/linear.cuh`) have in common: how their work is cut, what they take, their workspace.
//!
//! Each multiplies 1 to 128 rows in one read of the weights, more in passes of 128, and differs from the others in what
//! it does with the sums: [`super::qkv`], [`super::project`], [`super::swiglu`], [`super::head`], [`super::inject`]. All but
//! the head have twins for prompts in `cuda/model/prefill.cu`, which cut the work for many rows: see [`Prompt`].

use crate::gpu::device::{Arg, Buffer, Device, Kernel};
use crate::{Error, Result};

/// Packed rows of the weights per block.
const BLOCK: usize = 128;
/// The most slices of K; as in `linear.cuh`.
const MAX_SPLITS: usize = 8;
/// Blocks that run at once on an H200: two on each of its 132 multiprocessors.
const AT_ONCE: usize = 264;
/// Groups of 32 k a slice has at least, or its start would cost more than it brings.
const LEAST_GROUPS: usize = 8;
/// Rows of one pass over the weights at most.
pub const PASS: usize = 128;

/// `y = x W^T` for `W [n][k]`: everything that decides a row's bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub n: usize,
    pub k: usize,
}

impl Shape {
    /// Rows of the packed weights: `n` rounded up to whole tiles of 16.
    pub fn packed_rows(&self) -> usize {
        self.n.next_multiple_of(16)
    }

    /// Bytes of the packed weights.
    pub fn weight_bytes(&self) -> usize {
        self.packed_rows() * self.k * 2
    }

    /// Blocks of 128 packed rows; also columns of `best` of the head kernel.
    pub fn blocks(&self) -> usize {
        self.n.div_ceil(BLOCK)
    }

    /// Partial sums of squares that a row of `n` leaves for the next norm, one per 128 columns.
    pub fn parts(&self) -> usize {
        self.n.div_ceil(BLOCK)
    }

    /// Groups of 32 k per slice, and slices of K: as many as fill the card once. Of the shape alone, so that bits
    /// depend on nothing else.
    pub fn slices(&self) -> (usize, usize) {
        let groups = (self.k / 32).max(1);
        let most = (AT_ONCE / self.blocks().max(1)).min(groups / LEAST_GROUPS).clamp(1, MAX_SPLITS);
        let slice = groups.div_ceil(most);
        (slice, groups.div_ceil(slice))
    }

    /// Bytes of partial sums and number of counters that a launch on `rows` rows needs in its [`Workspace`].
    pub fn workspace(&self, rows: usize) -> (usize, usize) {
        let (_, splits) = self.slices();
        if splits == 1 {
            return (0, 0);
        }
        let places = rows.div_ceil(PASS) * self.blocks();
        (places * splits * BLOCK * tiles(rows).1 * 8 * 4, places)
    }
}

/// Scratch memory of the linear kernels, shared by all launches of a device, which run one after the other.
pub struct Workspace {
    partial: Buffer,
    counters: Buffer,
}

impl Workspace {
    /// Enough for launches of these shapes with up to as many rows. Costs device memory for the largest of them.
    ///
    /// # Errors
    /// [`Error::Memory`] where there is too little.
    pub fn new(device: &dyn Device, launches: &[(Shape, usize)]) -> Result<Workspace> {
        let (mut bytes, mut counters) = (16, 4);
        for (shape, rows) in launches {
            let (b, c) = shape.workspace(*rows);
            (bytes, counters) = (bytes.max(b), counters.max(c));
        }
        let partial = device.allocate(bytes, "partial sums of linear layers")?;
        let counters = device.allocate(counters * 4, "counters of linear layers")?;
        device.fill(&counters, 0)?;
        Ok(Workspace { partial, counters })
    }
}

/// What every linear kernel reads.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    /// Packed weights (see [`super::pack`]), sealed.
    pub weights: &'a Buffer,
    /// `[rows][k]` bf16.
    pub x: &'a Buffer,
    /// Sums of squares of the residual stream behind `x`, `[rows][ceil(k / 128)]` f32: results are multiplied by
    /// `1 / sqrt(sum / k + eps)`. `None`: by 1, which is all that [`super::project`] and [`super::inject`] do.
    pub sumsq: Option<&'a Buffer>,
    /// Of that norm, and of the head norms of the qkv kernel.
    pub eps: f32,
    /// The rows are a prompt's: take this kernel of `cuda/model/prefill.cu`. Its sums over K are not split, so its bits are others.
    pub prompt: Option<Prompt>,
    /// A u32 that is 0 where the launch has nothing to do.
    pub num_active: Option<&'a Buffer>,
    pub workspace: &'a Workspace,
}

/// The kernels for prompts, which differ in their main loop and in their bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prompt {
    /// By warps, on every card: `prefill_*`.
    Warps,
    /// By warpgroups with wgmma, where the compute_90a image runs: `prefill_*_wgmma`.
    Warpgroups,
}

/// The kernels that prompts go through where there is a choice. Not yet [`Prompt::Warpgroups`], which no card has run.
const PREFERRED: Prompt = Prompt::Warps;

impl Prompt {
    /// All there are, as in the kernels' lists.
    pub const ALL: [Prompt; 2] = [Prompt::Warps, Prompt::Warpgroups];

    /// What the engine takes on a device.
    pub fn of(device: &dyn Device) -> Prompt {
        if PREFERRED.runs_on(device) { PREFERRED } else { Prompt::Warps }
    }

    /// Whether the device has these kernels: wgmma and dependent launch come with the same image.
    pub fn runs_on(self, device: &dyn Device) -> bool {
        self == Prompt::Warps || device.properties().overlap
    }

    /// Tokens of a block of these kernels.
    const fn tokens(self) -> usize {
        match self {
            Prompt::Warps => 128,
            Prompt::Warpgroups => 256,
        }
    }

    /// Dynamic shared memory of a block: stages of 128 packed rows and its tokens, 64 k each; with wgmma they begin at a
    /// multiple of 1024.
    const fn shared(self) -> u32 {
        let (stages, aligning) = match self {
            Prompt::Warps => (3, 0),
            Prompt::Warpgroups => (4, 1024),
        };
        (stages * (BLOCK + self.tokens()) * 64 * 2 + aligning) as u32
    }
}

/// Where the rows of `x` are taken from, in place of 0, 1, 2...
#[derive(Clone, Copy)]
pub(super) struct Gather<'a> {
    /// `[rows]` u32
    pub rows: &'a Buffer,
    /// Rows of `x`.
    pub of: usize,
}

/// One launch without its epilogue.
pub(super) struct Launch<'a> {
    /// By number of 8-token tiles: 1, 2, 4, 8, 16.
    pub kernels: &'static [Kernel; 5],
    /// For prompts, as [`Prompt::ALL`].
    pub prefill: Option<&'static [Kernel; 2]>,
    pub shape: Shape,
    pub rows: usize,
    pub input: &'a Input<'a>,
    pub gather: Option<Gather<'a>>,
    /// Blocks of 128 packed rows left out at the start.
    pub first_block: usize,
}

/// The five entry points of a linear kernel.
pub(super) const fn kernels(file: &'static str, names: [&'static str; 5]) -> [Kernel; 5] {
    const fn one(file: &'static str, name: &'static str, index: usize) -> Kernel {
        Kernel { file, name, threads: 256, max_shared: shared(index, usize::MAX) }
    }
    [
        one(file, names[0], 0),
        one(file, names[1], 1),
        one(file, names[2], 2),
        one(file, names[3], 3),
        one(file, names[4], 4),
    ]
}

/// The entry points for prompts.
pub(super) const fn prefill(names: [&'static str; 2]) -> [Kernel; 2] {
    // A thread per token.
    const fn one(name: &'static str, prompt: Prompt) -> Kernel {
        Kernel { file: "prefill", name, threads: prompt.tokens() as u32, max_shared: prompt.shared() }
    }
    [one(names[0], Prompt::Warps), one(names[1], Prompt::Warpgroups)]
}

/// Which of the five entry points takes `rows` rows, and its number of 8-token tiles.
fn tiles(rows: usize) -> (usize, usize) {
    let index = (0..4).find(|i| rows <= 8 << i).unwrap_or(4);
    (index, 1 << index)
}

/// Dynamic shared memory of entry point `index` for slices of `groups` groups of 32 k: one or two chunks of activations,
/// later the finished tile. As `Staging` in `linear.cuh`.
const fn shared(index: usize, groups: usize) -> u32 {
    let tokens = 8 << index;
    let chunk = if index < 4 { 512 } else { 256 };
    let buffers = if groups <= chunk / 32 { 1 } else { 2 };
    // A chunk is larger than the tile of its tokens, 132 words each.
    (buffers * tokens * (chunk * 2 + 64)) as u32
}

impl Launch<'_> {
    /// Checks everything the main loop reaches and launches with the epilogue's arguments behind the common ones.
    pub fn run(&self, device: &dyn Device, epilogue: &[Arg]) -> Result<()> {
        let Launch { shape, rows, input, first_block, .. } = *self;
        let Shape { n, k } = shape;
        let (index, _) = tiles(rows);
        let kernel = match (input.prompt, self.prefill) {
            (None, _) => &self.kernels[index],
            (Some(prompt), Some(kernels)) => &kernels[prompt as usize],
            (Some(_), None) => {
                let name = self.kernels[index].name;
                return Err(Error::Internal(format!("kernel {name}: has no twin for prompts")));
            }
        };
        if input.prompt.is_some_and(|prompt| !prompt.runs_on(device)) {
            let card = &device.properties().name;
            return Err(Error::Internal(format!("kernel {}: {card} has no wgmma", kernel.name)));
        }
        let (slice, splits) = shape.slices();
        let passes = rows.div_ceil(PASS);
        if rows == 0
            || passes > 65535
            || n == 0
            || n > 1 << 30
            || k == 0
            || k > 1 << 30
            || !k.is_multiple_of(32)
        {
            return Err(Error::Internal(format!(
                "kernel {}: {rows} rows of {k} inputs and {n} outputs, needed are 1 to 8388480 rows and a multiple of 32 inputs",
                kernel.name
            )));
        }
        if first_block >= shape.blocks() {
            return Err(Error::Internal(format!(
                "kernel {}: nothing is left of {n} outputs behind {first_block} blocks of 128",
                kernel.name
            )));
        }
        let (partial, counters) = if input.prompt.is_some() { (0, 0) } else { shape.workspace(rows) };
        let needs = Needs(self.kernels[0].file);
        needs.buffer("weights", input.weights, shape.weight_bytes())?;
        needs.buffer("x", input.x, self.gather.map_or(rows, |g| g.of) * k * 2)?;
        if let Some(sumsq) = input.sumsq {
            super::at_least(needs.0, "sumsq", sumsq, rows * k.div_ceil(BLOCK) * 4)?;
        }
        if let Some(num_active) = input.num_active {
            super::at_least(needs.0, "num_active", num_active, 4)?;
        }
        needs.optional("gather", self.gather.map(|g| g.rows), rows * 4)?;
        needs.buffer("partial sums", &input.workspace.partial, partial)?;
        needs.buffer("counters", &input.workspace.counters, counters * 4)?;
        let mut args = vec![
            input.weights.into(),
            input.x.into(),
            or_null(self.gather.map(|g| g.rows)),
            or_null(input.sumsq),
            (&input.workspace.partial).into(),
            (&input.workspace.counters).into(),
            or_null(input.num_active),
            (rows as u32).into(),
            (n as u32).into(),
            (k as u32).into(),
            (slice as u32).into(),
            (self.gather.map_or(rows, |g| g.of) as u32).into(),
            (first_block as u32).into(),
            input.eps.into(),
        ];
        args.extend_from_slice(epilogue);
        let blocks = (shape.blocks() - first_block) as u32;
        if let Some(prompt) = input.prompt {
            let grid = [rows.div_ceil(prompt.tokens()) as u32, blocks, 1];
            return device.launch(kernel, grid, prompt.shared(), &args);
        }
        device.launch(kernel, [blocks, splits as u32, passes as u32], shared(index, slice), &args)
    }
}

/// Bytes a launch must move apart from its results: the weights in each pass, the rows and their sums of squares once.
pub(super) fn input_bytes(shape: Shape, rows: usize, normed: bool) -> u64 {
    let sums = if normed { shape.k.div_ceil(BLOCK) * 4 } else { 0 };
    (shape.weight_bytes() * rows.div_ceil(PASS) + rows * (shape.k * 2 + sums)) as u64
}

pub(super) fn or_null(buffer: Option<&Buffer>) -> Arg {
    buffer.map_or(Arg::Null, Arg::from)
}

/// What a kernel, named here, needs of its buffers: size, and the 16-byte alignment that a slice may lack.
pub(super) struct Needs(pub &'static str);

impl Needs {
    pub fn buffer(&self, what: &str, buffer: &Buffer, bytes: usize) -> Result<()> {
        super::aligned(self.0, what, buffer, bytes)
    }

    pub fn optional(&self, what: &str, buffer: Option<&Buffer>, bytes: usize) -> Result<()> {
        buffer.map_or(Ok(()), |buffer| self.buffer(what, buffer, bytes))
    }

    /// Refuses a shape the kernel cannot take, with what it would need.
    pub fn that(&self, holds: bool, needed: &str, got: &str) -> Result<()> {
        if holds {
            return Ok(());
        }
        Err(Error::Internal(format!("kernel {}: {got}; needed is {needed}", self.0)))
    }
}

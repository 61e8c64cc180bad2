//! The common part of the linear kernels (`cuda/model/linear.cuh`): how their work is split, their input,
//! their workspace.
//!
//! A launch reads the weights once for up to 128 rows, and once for each further 128 rows. The kernels differ
//! in their epilogues: [`super::qkv`], [`super::project`], [`super::swiglu`], [`super::head`],
//! [`super::inject`]. All but the head have counterparts for prompts in `cuda/model/prefill.cuh`, which split
//! the work for many rows: see [`PrefillKernel`].

use super::MAX_SHARED;
use super::check::{Check, or_null, u32s};
use crate::gpu::device::{Arg, Buffer, Device, Kernel};
use crate::{Error, Result};

/// Packed rows of the weights per CUDA block, or per half of one for more than 32 rows.
const BLOCK: usize = 128;
/// Maximum slices of K, as in `linear.cuh`.
const MAX_SPLITS: usize = 8;
/// Blocks of 128 packed rows to aim at. On an H200, with 132 multiprocessors, this many are resident together,
/// two on each for up to 32 rows; so are half as many blocks of 256. More slices of K would fill the rest, but
/// each one more is a result that one block reads at the end.
const BLOCKS: usize = 192;
/// Minimum size of a slice of K, in groups of 32. Starting a CUDA block costs more than a smaller slice
/// gains.
const MIN_GROUPS: usize = 8;
/// Bytes of static shared memory per token of a CUDA block: a row to gather, a scale, a `KvSlot`.
const STATIC_PER_TOKEN: u32 = 24;
/// Maximum rows in one pass over the weights.
pub const PASS: usize = 128;

/// The shape of the weights of `y = x W^T`, `W [n][k]`. The bits of a row of `y` depend only on this shape,
/// the row of `x` and the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Outputs.
    pub n: usize,
    /// Inputs.
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

    /// Blocks of 128 packed rows. For the head kernel this is also the number of columns of `best`.
    pub fn blocks(&self) -> usize {
        self.n.div_ceil(BLOCK)
    }

    /// Partial sums of squares per row for the next norm, one per 128 of the `n` columns.
    pub fn parts(&self) -> usize {
        self.n.div_ceil(BLOCK)
    }

    /// Groups of 32 inputs per slice of K, and the number of slices: about `BLOCKS` blocks of work. Both depend
    /// only on the shape, not on the device or the rows, because they determine the order of addition.
    pub fn slices(&self) -> (usize, usize) {
        let (groups, blocks) = ((self.k / 32).max(1), self.blocks().max(1));
        let fill = (2 * BLOCKS + blocks) / (2 * blocks);
        let slice = groups.div_ceil(fill.min(groups / MIN_GROUPS).clamp(1, MAX_SPLITS));
        (slice, groups.div_ceil(slice))
    }

    /// Bytes of partial sums and number of counters that a launch with `rows` rows needs in its
    /// [`Workspace`].
    pub fn workspace(&self, rows: usize) -> (usize, usize) {
        let (_, splits) = self.slices();
        if splits == 1 {
            return (0, 0);
        }
        let ((index, tiles), passes) = (tiles(rows), rows.div_ceil(PASS));
        let packed_rows = self.blocks().next_multiple_of(halves(index)) * BLOCK;
        // Launches with fewer rows, whose blocks have 128 packed rows, may use the same workspace.
        (passes * packed_rows * splits * tiles * 8 * 4, passes * self.blocks())
    }
}

/// Scratch memory of the linear kernels. All launches of a device can share one workspace, because they run
/// one after the other.
pub struct Workspace {
    partial: Buffer,
    counters: Buffer,
}

impl Workspace {
    /// Allocates a workspace for launches of each shape with up to the given number of rows.
    ///
    /// # Errors
    /// [`Error::Memory`] if the device has too little memory; device errors.
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

/// The input of a linear kernel.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    /// Packed weights (see [`super::pack`]), sealed.
    pub weights: &'a Buffer,
    /// `[rows][k]` bf16.
    pub x: &'a Buffer,
    /// `[rows][ceil(k / 128)]` f32: partial sums of squares of the residual stream that `x` was made from.
    /// Results are multiplied by `rstd = 1 / sqrt(sum / k + eps)`. `None`: results are not scaled.
    /// [`super::project`] and [`super::inject`] require `None`.
    pub sumsq: Option<&'a Buffer>,
    /// Epsilon of that norm, and of the head norms of the qkv kernel.
    pub eps: f32,
    /// For the rows of a prompt: the kernel of `cuda/model/prefill.cuh` to use. It does not split K, so its
    /// bits differ from those of a kernel that does.
    pub prefill_kernel: Option<PrefillKernel>,
    /// One u32; if it is 0, the launch does nothing. `None`: it always runs.
    pub num_active: Option<&'a Buffer>,
    /// Scratch memory, at least [`Shape::workspace`] for this launch.
    pub workspace: &'a Workspace,
}

/// The kernels for prompts. They differ in their main loop and in their bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrefillKernel {
    /// `prefill_*`: warps that use mma.sync, on every GPU.
    Mma,
    /// `prefill_*_wgmma`: warpgroups that use wgmma, on GPUs of compute capability 9.0.
    Wgmma,
}

/// The kernel for prompts on devices that have both. [`PrefillKernel::Wgmma`] has not run on a GPU, so it is
/// not the default.
const PREFERRED: PrefillKernel = PrefillKernel::Mma;

impl PrefillKernel {
    /// All kernels for prompts.
    pub const ALL: [PrefillKernel; 2] = [PrefillKernel::Mma, PrefillKernel::Wgmma];

    /// The kernel that the engine uses on a device.
    pub fn of(device: &dyn Device) -> PrefillKernel {
        if PREFERRED.runs_on(device) { PREFERRED } else { PrefillKernel::Mma }
    }

    /// Whether the device has this kernel.
    pub fn runs_on(self, device: &dyn Device) -> bool {
        self == PrefillKernel::Mma || device.properties().capability == (9, 0)
    }

    /// Tokens per CUDA block, which is also its number of threads.
    const fn tokens(self) -> usize {
        match self {
            PrefillKernel::Mma => 128,
            PrefillKernel::Wgmma => 256,
        }
    }

    /// Bytes of dynamic shared memory of a CUDA block: stages of 128 packed rows and the block's tokens, 64
    /// inputs each. For wgmma the stages begin at a multiple of 1024.
    const fn shared(self) -> u32 {
        let (stages, alignment) = match self {
            PrefillKernel::Mma => (3, 0),
            PrefillKernel::Wgmma => (4, 1024),
        };
        (stages * (BLOCK + self.tokens()) * 64 * 2 + alignment) as u32
    }
}

/// Selects rows of `x` instead of rows 0, 1, 2...
#[derive(Clone, Copy)]
pub(super) struct Gather<'a> {
    /// `[rows]` u32.
    pub rows: &'a Buffer,
    /// Number of rows of `x`.
    pub of: usize,
}

/// The entry points of a linear kernel.
pub(super) struct Kernels {
    /// By number of 8-token tiles: 1, 2, 4, 8, 16.
    decode: [Kernel; 5],
    /// In the order of [`PrefillKernel::ALL`].
    prefill: Option<[Kernel; 2]>,
}

/// The entry points with these names: those in `file` by number of tiles, and those in `prefill.cu` and
/// `prefill_wgmma.cu`.
pub(super) const fn kernels(
    file: &'static str,
    names: [&'static str; 5],
    prefill: Option<[&'static str; 2]>,
) -> Kernels {
    const fn decode(file: &'static str, name: &'static str, index: usize) -> Kernel {
        let max_shared = shared(index, usize::MAX);
        assert!(max_shared + (8 << index) * STATIC_PER_TOKEN <= MAX_SHARED);
        Kernel { file, name, threads: 256, max_shared }
    }
    const fn prompt(name: &'static str, kernel: PrefillKernel) -> Kernel {
        let threads = kernel.tokens() as u32;
        let shared = kernel.shared() + threads * STATIC_PER_TOKEN;
        assert!(shared <= MAX_SHARED || matches!(kernel, PrefillKernel::Wgmma));
        let file = match kernel {
            PrefillKernel::Mma => "prefill",
            PrefillKernel::Wgmma => "prefill_wgmma",
        };
        Kernel { file, name, threads, max_shared: kernel.shared() }
    }
    Kernels {
        decode: [
            decode(file, names[0], 0),
            decode(file, names[1], 1),
            decode(file, names[2], 2),
            decode(file, names[3], 3),
            decode(file, names[4], 4),
        ],
        prefill: match prefill {
            Some([mma, wgmma]) => {
                Some([prompt(mma, PrefillKernel::Mma), prompt(wgmma, PrefillKernel::Wgmma)])
            }
            None => None,
        },
    }
}

/// Index of the entry point for `rows` rows, and its number of 8-token tiles.
fn tiles(rows: usize) -> (usize, usize) {
    let index = (0..4).find(|i| rows <= 8 << i).unwrap_or(4);
    (index, 1 << index)
}

/// Halves of a CUDA block of entry point `index`, as in `linear.cuh`: blocks of 128 packed rows.
const fn halves(index: usize) -> usize {
    if index < 3 { 1 } else { 2 }
}

/// Bytes of dynamic shared memory of entry point `index` for slices of `groups` groups of 32 inputs: one or
/// two chunks of activations, as `Staging` in `linear.cuh`. The finished tile, 132 words per token, later overwrites
/// them.
const fn shared(index: usize, groups: usize) -> u32 {
    let tokens = 8 << index;
    let chunk = [512, 512, 512, 256, 128][index];
    let buffers = if groups <= chunk / 32 { 1 } else { 2 };
    let (staged, tile) = (buffers * (chunk * 2 + 64), 132 * 4);
    (tokens * if staged > tile { staged } else { tile }) as u32
}

/// One launch of a linear kernel, without the arguments of its epilogue.
pub(super) struct Launch<'a> {
    pub kernels: &'static Kernels,
    pub shape: Shape,
    pub rows: usize,
    pub input: &'a Input<'a>,
    pub gather: Option<Gather<'a>>,
    /// Number of blocks of 128 packed rows to skip at the start.
    pub first_block: usize,
}

impl<'a> Launch<'a> {
    /// A launch with all of the weights and rows 0, 1, 2... of `x`.
    pub fn new(kernels: &'static Kernels, shape: Shape, rows: usize, input: &'a Input<'a>) -> Launch<'a> {
        Launch { kernels, shape, rows, input, gather: None, first_block: 0 }
    }

    /// Checks everything that the main loop reads or writes. Launches with the common arguments, followed by
    /// those of the epilogue.
    pub fn run(&self, device: &dyn Device, epilogue: &[Arg]) -> Result<()> {
        let Launch { kernels, shape, rows, input, gather, first_block } = *self;
        let Shape { n, k } = shape;
        let (index, _) = tiles(rows);
        let kernel = match (input.prefill_kernel, &kernels.prefill) {
            (None, _) => &kernels.decode[index],
            (Some(kernel), Some(prefill)) => &prefill[kernel as usize],
            (Some(_), None) => {
                let name = kernels.decode[index].name;
                return Err(Error::Internal(format!("kernel {name}: has no counterpart for prompts")));
            }
        };
        if input.prefill_kernel.is_some_and(|kernel| !kernel.runs_on(device)) {
            let card = &device.properties().name;
            return Err(Error::Internal(format!("kernel {}: {card} has no wgmma", kernel.name)));
        }
        let (slice, splits) = shape.slices();
        let passes = rows.div_ceil(PASS);
        let (sizes, limits) = ([n, k], 1..=1 << 30);
        let fits = sizes.iter().all(|size| limits.contains(size)) && k.is_multiple_of(32);
        Check(kernel.name).that(
            fits && (1..=65535).contains(&passes),
            format_args!("{rows} rows of {k} inputs and {n} outputs"),
            "1 to 8388480 rows and a multiple of 32 inputs",
        )?;
        Check(kernel.name).that(
            first_block < shape.blocks(),
            format_args!("{n} outputs without the first {first_block} blocks of 128"),
            "at least one block",
        )?;
        let (partial, counters) = if input.prefill_kernel.is_some() { (0, 0) } else { shape.workspace(rows) };
        let (gather, x_rows) = (gather.map(|g| g.rows), gather.map_or(rows, |g| g.of));
        let Workspace { partial: partial_sums, counters: partial_counters } = input.workspace;
        let check = Check(kernels.decode[0].file);
        check.aligned("weights", input.weights, shape.weight_bytes())?;
        check.aligned("x", input.x, x_rows * k * 2)?;
        if let Some(sumsq) = input.sumsq {
            check.at_least("sumsq", sumsq, rows * k.div_ceil(BLOCK) * 4)?;
        }
        if let Some(num_active) = input.num_active {
            check.at_least("num_active", num_active, 4)?;
        }
        check.optional("gather", gather, rows * 4)?;
        check.aligned("partial sums", partial_sums, partial)?;
        check.aligned("counters", partial_counters, counters * 4)?;
        let mut args = vec![input.weights.into(), input.x.into(), or_null(gather), or_null(input.sumsq)];
        args.extend([partial_sums.into(), partial_counters.into(), or_null(input.num_active)]);
        args.extend(u32s([rows, n, k, slice, x_rows, first_block]));
        args.push(input.eps.into());
        args.extend_from_slice(epilogue);
        let blocks = shape.blocks() - first_block;
        if let Some(prefill) = input.prefill_kernel {
            let grid = [rows.div_ceil(prefill.tokens()) as u32, blocks as u32, 1];
            return device.launch(kernel, grid, prefill.shared(), &args);
        }
        let grid = [blocks.div_ceil(halves(index)), splits, passes].map(|n| n as u32);
        device.launch(kernel, grid, shared(index, slice), &args)
    }
}

/// Checks the common arguments of `project` and `inject`: a multiple of 32 outputs, an input that is not
/// scaled, and the buffers `y` `[rows][n]` bf16, `sumsq` `[rows][parts]` f32 and `gain` `[n]` f32.
pub(super) fn check_unscaled(
    check: &Check,
    shape: Shape,
    rows: usize,
    input: &Input,
    [y, sumsq, gain]: [&Buffer; 3],
) -> Result<()> {
    let n = shape.n;
    check.that(n.is_multiple_of(32), format_args!("{n} outputs"), "a multiple of 32")?;
    let expected = "none, since results are not scaled";
    check.that(input.sumsq.is_none(), "sums of squares of the input", expected)?;
    check.aligned("y", y, rows * n * 2)?;
    check.at_least("sumsq", sumsq, rows * shape.parts() * 4)?;
    check.aligned("gain", gain, n * 4)
}

/// Bytes that a launch must read: the weights once per pass, the rows, and the sums of squares if the rows
/// are `normed`.
pub(super) fn input_bytes(shape: Shape, rows: usize, normed: bool) -> u64 {
    let sums = if normed { shape.k.div_ceil(BLOCK) * 4 } else { 0 };
    (shape.weight_bytes() * rows.div_ceil(PASS) + rows * (shape.k * 2 + sums)) as u64
}

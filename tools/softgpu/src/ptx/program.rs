//! The decoded form of a kernel: a compact array of instructions whose operands are rows of a register file.

use std::collections::HashMap;
use std::sync::Arc;

/// Set in an operand that names a row of the constants instead of the registers.
pub(crate) const CONSTANT: u32 = 1 << 31;
/// No operand, or the sink `_`.
pub(crate) const NONE: u32 = u32::MAX;
/// The guard of an instruction that always runs.
pub(crate) const ALWAYS: u16 = u16::MAX;
/// The lowest generic address of shared memory.
pub(crate) const SHARED_WINDOW: u64 = 1 << 56;
/// The lowest generic address of local memory.
pub(crate) const LOCAL_WINDOW: u64 = 1 << 57;
/// The first address of a block's variables in shared memory. A card keeps the bytes before it for the system.
pub(crate) const SHARED_START: u32 = 1024;
/// Bytes between two variables in shared memory that belong to neither.
pub(crate) const SHARED_GAP: u32 = 64;

/// The type of an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Ty {
    Pred,
    B8,
    B16,
    B32,
    B64,
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    F16,
    BF16,
    F16x2,
    BF16x2,
    F32,
    F64,
}

impl Ty {
    /// The type with this name in an opcode or after `.reg`.
    pub fn of(name: &str) -> Option<Ty> {
        Some(match name {
            "pred" => Ty::Pred,
            "b8" => Ty::B8,
            "b16" => Ty::B16,
            "b32" => Ty::B32,
            "b64" => Ty::B64,
            "u8" => Ty::U8,
            "u16" => Ty::U16,
            "u32" => Ty::U32,
            "u64" => Ty::U64,
            "s8" => Ty::S8,
            "s16" => Ty::S16,
            "s32" => Ty::S32,
            "s64" => Ty::S64,
            "f16" => Ty::F16,
            "bf16" => Ty::BF16,
            "f16x2" => Ty::F16x2,
            "bf16x2" => Ty::BF16x2,
            "f32" => Ty::F32,
            "f64" => Ty::F64,
            _ => return None,
        })
    }

    /// Its size in bytes; a predicate has none.
    #[inline]
    pub fn bytes(self) -> u32 {
        match self {
            Ty::Pred => 0,
            Ty::B8 | Ty::U8 | Ty::S8 => 1,
            Ty::B16 | Ty::U16 | Ty::S16 | Ty::F16 | Ty::BF16 => 2,
            Ty::B32 | Ty::U32 | Ty::S32 | Ty::F32 | Ty::F16x2 | Ty::BF16x2 => 4,
            Ty::B64 | Ty::U64 | Ty::S64 | Ty::F64 => 8,
        }
    }

    pub fn is_float(self) -> bool {
        matches!(self, Ty::F16 | Ty::BF16 | Ty::F16x2 | Ty::BF16x2 | Ty::F32 | Ty::F64)
    }

    pub fn is_signed(self) -> bool {
        matches!(self, Ty::S8 | Ty::S16 | Ty::S32 | Ty::S64)
    }

    pub fn is_bits(self) -> bool {
        matches!(self, Ty::B8 | Ty::B16 | Ty::B32 | Ty::B64)
    }
}

/// A state space of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    Generic,
    Global,
    Shared,
    Local,
    Const,
    Param,
}

/// How two operands are compared. The unordered forms are true if either operand is NaN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cmp {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    Equ,
    Neu,
    Ltu,
    Leu,
    Gtu,
    Geu,
    Num,
    Nan,
}

/// A special register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Special {
    Tid(u8),
    Ntid(u8),
    Ctaid(u8),
    Nctaid(u8),
    LaneId,
    WarpId,
    NWarpId,
    SmId,
    NSmId,
    GridId,
    LanemaskEq,
    LanemaskLe,
    LanemaskLt,
    LanemaskGe,
    LanemaskGt,
    Clock,
    Clock64,
    GlobalTimer,
    DynamicSharedSize,
    TotalSharedSize,
}

/// What an atomic operation does with the value in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Atom {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
    Inc,
    Dec,
    Exch,
    Cas,
}

/// An operation. The comment names its operands: d is written, a, b and c are read, x is an immediate number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    // Values: d = f(a, b, c) in the type `ty`.
    Mov,
    /// d = the `n` registers in the list at a, lowest first, each of type `from`; and back
    Pack,
    Unpack,
    /// d = special register x
    Special,
    Add,
    Sub,
    MulLo,
    MulHi,
    /// d has twice the width of `ty`, as in MadWide.
    MulWide,
    MadLo,
    MadHi,
    MadWide,
    Fma,
    Div,
    Rem,
    Min,
    Max,
    Neg,
    Abs,
    And,
    Or,
    Xor,
    Not,
    Shl,
    Shr,
    /// Funnel shifts of the pair (b, a) by c.
    ShfL,
    ShfR,
    /// Field of a at b of c bits.
    Bfe,
    /// d = b with the low bits of a inserted at c; x is the operand of the length.
    Bfi,
    Popc,
    Clz,
    Brev,
    Bfind,
    BfindShift,
    Prmt,
    /// Truth table x.
    Lop3,
    Copysign,
    Sqrt,
    Rcp,
    Rsqrt,
    Ex2,
    Lg2,
    /// d (a predicate) = a cmp b, combined with predicate c by x; e is the inverted result.
    Setp,
    /// d = c ? a : b, c a predicate
    Selp,
    /// d = a converted from `from` to `ty`
    Cvt,
    /// d = two halves, a high and b low, of `ty`
    CvtPack,
    // Predicates, one bit a lane.
    PMov,
    PAnd,
    POr,
    PXor,
    PNot,
    // Control.
    /// to instruction x
    Bra,
    Ret,
    Trap,
    // Memory: address a + x. The data registers are d, or `n` of them in the list at d.
    Ld,
    St,
    /// d = old value, b and c the operands; `atom` says what is done
    Atomic,
    /// 16 (b bytes at most from) shared a + x, global c
    CpAsync,
    /// b bytes of global memory at a + x into L2
    Prefetch,
    CpAsyncCommit,
    /// All but the newest x groups; NONE: all copies.
    CpAsyncWait,
    Fence,
    /// `fence.proxy.async`
    FenceProxy,
    // Between lanes and threads.
    /// d, predicate e = a of lane b with clamp c, in the lanes of mask x (an operand)
    Shfl,
    /// d = vote of predicate a in the lanes of mask b
    Vote,
    /// d = a reduced over the lanes of mask b
    Redux,
    /// barrier a, with b threads or NONE
    Bar,
    /// lanes of mask a
    BarWarp,
    Activemask,
    DependentsLaunch,
    DependentsWait,
    // Tensor cores: the registers are in the list at d.
    /// d[4], a[4], b[2], c[4]
    Mma,
    /// `n` registers from the address a + x
    Ldmatrix,
    WgmmaFence,
    WgmmaCommit,
    WgmmaWait,
    /// d[x], descriptors a and b, predicate c: add to d
    Wgmma,
}

/// Modifiers in [`Instr::flags`], by operation.
pub(crate) mod flag {
    /// f32: subnormal operands and results become zero.
    pub const FTZ: u16 = 1;
    /// The result is clamped to 0..1, or to the range of the type.
    pub const SAT: u16 = 2;
    /// Approximate: the result may differ in its last bits.
    pub const APPROX: u16 = 4;
    /// min, max: NaN if either operand is. prmt, shf: unused.
    pub const NAN: u16 = 8;
    /// Rounding to integer: nearest even, zero, down, up; also without integer type (`cvt.rni.f32.f32`).
    pub const RNI: u16 = 16;
    pub const RZI: u16 = 32;
    pub const RMI: u16 = 64;
    pub const RPI: u16 = 128;
    /// A multiplication or addition without a rounding modifier: ptxas may contract it.
    pub const CONTRACT: u16 = 512;
    /// shf: the shift amount wraps at 32.
    pub const WRAP: u16 = 1;
    /// Transposed ldmatrix.
    pub const TRANS: u16 = 1;
    /// ld: read-only path (`.nc`).
    pub const NC: u16 = 1;
    /// ld and st: `.volatile`, `.relaxed`: no race with other such accesses.
    pub const STRONG: u16 = 2;
    pub const ACQUIRE: u16 = 4;
    pub const RELEASE: u16 = 8;
    /// fence: of the GPU or the whole system.
    pub const DEVICE: u16 = 16;
    /// fence, ld, st: of the whole system.
    pub const SYSTEM: u16 = 32;
    /// vote: all, any, uni, ballot in bits 0..2; shfl: up, down, bfly, idx.
    pub const MODE: u16 = 3;
    /// ld, st: the data registers have 64 bits and the type has fewer.
    pub const WIDE: u16 = 1 << 13;
    /// The address is a 32-bit row.
    pub const NARROW: u16 = 1 << 14;
    /// The instruction reads or writes a register that may be read before it is written.
    pub const TRACKED: u16 = 1 << 15;
}

/// One instruction. Operands are rows of the register file, or of the constants with [`CONSTANT`]; predicates are indices
/// of their own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Instr {
    pub op: Op,
    pub ty: Ty,
    /// cvt: the source type. setp, ld, st: see [`Op`].
    pub from: Ty,
    pub space: Space,
    pub cmp: Cmp,
    pub atom: Atom,
    /// Registers of a vector access; 1 is a scalar.
    pub n: u8,
    pub flags: u16,
    /// Predicate index times 2, plus 1 if it is negated; or [`ALWAYS`].
    pub guard: u16,
    pub d: u32,
    pub a: u32,
    pub b: u32,
    pub c: u32,
    pub e: u32,
    pub x: u32,
}

impl Instr {
    pub fn new(op: Op, ty: Ty) -> Instr {
        Instr {
            op,
            ty,
            from: ty,
            space: Space::Generic,
            cmp: Cmp::Eq,
            atom: Atom::Add,
            n: 1,
            flags: 0,
            guard: ALWAYS,
            d: NONE,
            a: NONE,
            b: NONE,
            c: NONE,
            e: NONE,
            x: 0,
        }
    }

    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// A place in the source file, from `.loc`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Loc {
    /// Number of the file, 0 for none.
    pub file: u32,
    pub line: u32,
    /// For inlined code, the place of the outermost call; the file is 0 for none.
    pub outer_file: u32,
    pub outer_line: u32,
}

/// A parameter of a kernel, in the order of declaration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Param {
    /// Bytes from the start of the parameters.
    pub offset: u32,
    /// Bytes.
    pub size: u32,
    /// Bytes.
    pub align: u32,
}

/// A constant of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Constant {
    Bits(u64),
    /// Bytes from the start of dynamic shared memory.
    DynamicShared(u64),
    /// A variable of the module, by index, and bytes from its start.
    Variable(u32, u64),
    /// The parameter bytes from this offset on.
    Param(u32),
}

/// A variable in shared memory.
#[derive(Clone, Debug)]
pub(crate) struct SharedVariable {
    pub name: String,
    pub offset: u32,
    pub bytes: u32,
}

/// A kernel, ready to run.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The name of the entry.
    pub name: String,
    /// The parameters, in order.
    pub params: Vec<Param>,
    /// Bytes of static shared memory.
    pub shared: u32,
    /// `.maxntid`: threads of a block at most, 1024 if the kernel does not say.
    pub max_threads: u32,
    /// An estimate of the 32-bit registers of a thread: the most that hold a value at once, or what `.maxntid` and
    /// `.minnctapersm` leave if that is less.
    pub registers: u32,
    /// Bytes of local memory of a thread.
    pub local: u32,
    pub(crate) code: Vec<Instr>,
    /// Registers of vector operands.
    pub(crate) lists: Vec<u32>,
    pub(crate) locs: Vec<Loc>,
    /// Lines of the PTX.
    pub(crate) lines: Vec<u32>,
    pub(crate) files: Arc<HashMap<u32, String>>,
    /// Rows of 32 32-bit values that a warp needs. A 64-bit register takes two.
    pub(crate) rows: u32,
    pub(crate) predicates: u32,
    /// The constants by row: a value and whether it takes two rows.
    pub(crate) constants: Vec<(Constant, bool)>,
    /// The values of the constants, with the addresses of variables filled in. Those of parameters come with a launch.
    pub(crate) values: Vec<u64>,
    pub(crate) specials: Vec<Special>,
    pub(crate) shared_variables: Arc<[SharedVariable]>,
    /// Address in shared memory at which dynamic shared memory starts.
    pub(crate) dynamic_start: u32,
    /// The smallest access to shared memory, in bytes, at most 4.
    pub(crate) shared_unit: u32,
    pub(crate) uses_wgmma: bool,
    /// Whether a register may be read before it is written.
    pub(crate) tracked: bool,
    /// [instruction]: the rows that it accesses, for instructions with [`flag::TRACKED`].
    pub(crate) accesses: Vec<Vec<RowAccess>>,
}

/// An access of an instruction to a row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowAccess {
    pub row: u32,
    pub write: bool,
    /// The register may be read before it is written.
    pub early: bool,
}

impl Kernel {
    /// Bytes of all parameters.
    pub fn param_bytes(&self) -> u32 {
        self.params.last().map_or(0, |p| p.offset + p.size)
    }

    /// Lines of the PTX whose multiplication feeds an addition, both without a rounding modifier, which ptxas may join to
    /// one `fma` with another result.
    pub fn contractible(&self) -> Vec<u32> {
        let mut products = HashMap::new();
        let mut found = Vec::new();
        for (pc, i) in self.code.iter().enumerate() {
            if i.op == Op::Add && i.has(flag::CONTRACT) {
                found.extend([i.a, i.b].iter().filter_map(|r| products.get(r)).copied());
            }
            products.remove(&i.d);
            if i.op == Op::MulLo && i.has(flag::CONTRACT) && i.ty.is_float() {
                products.insert(i.d, self.lines[pc]);
            }
        }
        found.sort_unstable();
        found.dedup();
        found
    }

    /// Where an instruction comes from: the .cu file and line, and the line of the PTX.
    pub(crate) fn place(&self, pc: usize) -> String {
        let loc = self.locs[pc];
        let name = |file: u32| {
            self.files.get(&file).map_or("?", |path| path.rsplit('/').next().unwrap_or(path)).to_string()
        };
        let ptx = format!("PTX line {}", self.lines[pc]);
        match (loc.file, loc.outer_file) {
            (0, _) => ptx,
            (file, 0) => format!("{}:{} ({ptx})", name(file), loc.line),
            (file, outer) => {
                format!("{}:{}, inlined at {}:{} ({ptx})", name(file), loc.line, name(outer), loc.outer_line)
            }
        }
    }
}

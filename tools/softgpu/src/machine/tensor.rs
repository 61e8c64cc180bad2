//! Products of tensor cores: `mma.sync` and `wgmma`.
//!
//! Fragments are rows of 32 registers, lane 4 g + t. As bytes, the row of an A or B register is an 8x8 matrix of bf16 in
//! row-major order.

use super::Sums;
use super::block::{Core, Env};
use super::exec::{Result, predicate};
use super::fault::Trouble;
use super::lanes::{LANES, Rows};
use super::math::{canonical, from_bf16};
use super::shared::{Shared, Who};
use super::warp::Warp;
use crate::ptx::program::{Instr, Op, RowAccess};

/// D = A B + C for m16n8k16: a[4], b[2] registers of bf16 pairs, c[4] of f32.
#[inline(always)]
pub(super) fn mma(
    a: [&[u32; LANES]; 4],
    b: [&[u32; LANES]; 2],
    c: [&[f32; LANES]; 4],
    sums: Sums,
) -> [[f32; LANES]; 4] {
    if sums == Sums::Ascending {
        return ascending_columns(a, b, c);
    }
    let (mut left, mut right) = ([[0.0; 16]; 16], [[0.0; 8]; 16]);
    let low = |pair: u32| f32::from_bits(pair << 16);
    let high = |pair: u32| f32::from_bits(pair & 0xffff_0000);
    for (part, pairs) in a.iter().enumerate() {
        for lane in 0..LANES {
            let (row, k) = (part % 2 * 8 + lane / 4, part / 2 * 8 + lane % 4 * 2);
            left[row][k] = low(pairs[lane]);
            left[row][k + 1] = high(pairs[lane]);
        }
    }
    for (part, pairs) in b.iter().enumerate() {
        for t in 0..4 {
            for n in 0..8 {
                right[part * 8 + t * 2][n] = low(pairs[n * 4 + t]);
                right[part * 8 + t * 2 + 1][n] = high(pairs[n * 4 + t]);
            }
        }
    }
    product(&left, &right, c, sums)
}

/// The columns of a row of registers as an 8x4 matrix: [t][g] of lane 4 g + t.
#[inline(always)]
fn transpose<T: Copy + Default>(row: &[T; LANES]) -> [[T; 8]; 4] {
    let mut out = [[T::default(); 8]; 4];
    for t in 0..4 {
        for g in 0..8 {
            out[t][g] = row[g * 4 + t];
        }
    }
    out
}

/// The product with its terms added in ascending order of k: for each column a vector of 16 rows.
#[inline(always)]
fn ascending_columns(
    a: [&[u32; LANES]; 4],
    b: [&[u32; LANES]; 2],
    c: [&[f32; LANES]; 4],
) -> [[f32; LANES]; 4] {
    // [column][row]
    let mut sums = [[0.0f32; 16]; 8];
    for (part, c) in c.iter().enumerate() {
        for (t, rows) in transpose(c).iter().enumerate() {
            sums[t * 2 + part % 2][part / 2 * 8..][..8].copy_from_slice(rows);
        }
    }
    for half in 0..2 {
        let (upper, lower) = (transpose(a[half * 2]), transpose(a[half * 2 + 1]));
        for t in 0..4 {
            let mut pairs = [0u32; 16];
            pairs[..8].copy_from_slice(&upper[t]);
            pairs[8..].copy_from_slice(&lower[t]);
            for (n, sum) in sums.iter_mut().enumerate() {
                let pair = b[half][n * 4 + t];
                let (low, high) = (f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000));
                for row in 0..16 {
                    sum[row] += f32::from_bits(pairs[row] << 16) * low;
                    sum[row] += f32::from_bits(pairs[row] & 0xffff_0000) * high;
                }
            }
        }
    }
    let mut out = [[0.0; LANES]; 4];
    for (part, out) in out.iter_mut().enumerate() {
        for g in 0..8 {
            for t in 0..4 {
                out[g * 4 + t] = canonical(sums[t * 2 + part % 2][part / 2 * 8 + g]);
            }
        }
    }
    out
}

/// The product of a 16x16 and a 16x8 matrix, added to a fragment.
#[inline(always)]
fn product(
    left: &[[f32; 16]; 16],
    right: &[[f32; 8]; 16],
    c: [&[f32; LANES]; 4],
    sums: Sums,
) -> [[f32; LANES]; 4] {
    let mut out = [[0.0; LANES]; 4];
    for row in 0..16 {
        let (half, g) = (row / 8 * 2, row % 8);
        let mut sum = [0.0; 8];
        for t in 0..4 {
            sum[t * 2] = c[half][g * 4 + t];
            sum[t * 2 + 1] = c[half + 1][g * 4 + t];
        }
        let sum = match sums {
            Sums::Ascending => ascending(&left[row], right, sum),
            Sums::Pairwise => pairwise(&left[row], right, sum),
            Sums::Aligned => aligned(&left[row], right, sum),
        };
        for t in 0..4 {
            out[half][g * 4 + t] = canonical(sum[t * 2]);
            out[half + 1][g * 4 + t] = canonical(sum[t * 2 + 1]);
        }
    }
    out
}

/// One row of a product, added to a row in ascending order of k.
#[inline(always)]
fn ascending(left: &[f32; 16], right: &[[f32; 8]; 16], mut sum: [f32; 8]) -> [f32; 8] {
    for k in 0..16 {
        for n in 0..8 {
            sum[n] += left[k] * right[k][n];
        }
    }
    sum
}

/// The products of one row: [k][column].
#[inline(always)]
fn products(left: &[f32; 16], right: &[[f32; 8]; 16]) -> [[f32; 8]; 16] {
    let mut products = [[0.0; 8]; 16];
    for k in 0..16 {
        for n in 0..8 {
            products[k][n] = left[k] * right[k][n];
        }
    }
    products
}

/// One row of a product, its terms added in pairs and then to a row.
#[inline(always)]
fn pairwise(left: &[f32; 16], right: &[[f32; 8]; 16], mut sum: [f32; 8]) -> [f32; 8] {
    let mut products = products(left, right);
    for step in [8, 4, 2, 1] {
        for k in 0..step {
            for n in 0..8 {
                products[k][n] = products[k * 2][n] + products[k * 2 + 1][n];
            }
        }
    }
    for n in 0..8 {
        sum[n] += products[0][n];
    }
    sum
}

/// One row of a product, added to a row as tensor cores do: all terms are aligned to the largest exponent, cut off two bits
/// below f32's last place, added exactly, and the sum is cut off to f32.
#[inline(always)]
fn aligned(left: &[f32; 16], right: &[[f32; 8]; 16], start: [f32; 8]) -> [f32; 8] {
    let products = products(left, right);
    let terms = || products.iter().chain([&start]);
    let exponent = |x: f32| (x.to_bits() >> 23 & 255).max(1);
    let (mut plain, mut largest) = ([0.0; 8], [1; 8]);
    for term in terms() {
        for n in 0..8 {
            plain[n] += term[n];
            largest[n] = largest[n].max(exponent(term[n]));
        }
    }
    // 17 terms of 26 bits.
    let mut sum = [0i32; 8];
    for term in terms() {
        for n in 0..8 {
            let bits = term[n].to_bits();
            let fraction = bits & 0x7f_ffff | u32::from(bits & 0x7f80_0000 != 0) << 23;
            let part = ((fraction << 2) >> (largest[n] - exponent(term[n])).min(31)) as i32;
            sum[n] += if bits >> 31 == 1 { -part } else { part };
        }
    }
    let mut out = [0.0; 8];
    for n in 0..8 {
        let magnitude = sum[n].unsigned_abs();
        let cut = 8u32.saturating_sub(magnitude.leading_zeros());
        let kept = f64::from((magnitude >> cut) << cut);
        // 2^(largest - 127 - 25): 25 = 23 bits of the fraction and the two below.
        let value = kept * f64::from_bits(u64::from(largest[n] + 1023 - 152) << 52);
        let value = (if sum[n] < 0 { -value } else { value }) as f32;
        out[n] = if plain[n].is_finite() { value } else { plain[n] };
    }
    out
}

// ---- wgmma ----

/// The products that a warpgroup has started: all four warps must start the same ones.
#[derive(Default)]
pub(super) struct Groups {
    /// (instruction, descriptors) of each product so far.
    issued: Vec<(usize, u64, u64)>,
    /// [warp of the group]: how many it has started.
    count: [usize; 4],
}

impl Groups {
    /// Warps of the group that have started fewer products than others, once all have ended.
    pub fn missing(&self) -> Option<usize> {
        (0..4).find(|warp| self.count[*warp] < self.issued.len())
    }
}

/// A product that is not waited for.
struct Pending {
    group: u32,
    /// 16-byte chunks of shared memory that it reads.
    chunks: Vec<u32>,
    accumulators: std::ops::Range<usize>,
}

/// A warp's part of asynchronous products.
#[derive(Default)]
pub(super) struct Products {
    pending: Vec<Pending>,
    /// Groups committed.
    groups: u32,
    fenced: bool,
    /// [row]: written since the last `wgmma.fence`.
    dirty: Vec<bool>,
    /// [row]: products in flight that add to it.
    busy: Vec<u8>,
}

impl Products {
    /// An ordinary instruction accesses rows: none may belong to a product in flight.
    pub fn check(&mut self, accesses: &[RowAccess]) -> Result<()> {
        for access in accesses {
            let row = access.row as usize;
            if self.busy.get(row).is_some_and(|n| *n > 0) {
                return Err(Trouble::new("an accumulator of a wgmma that is not waited for is accessed"));
            }
            if access.write {
                if self.dirty.len() <= row {
                    self.dirty.resize(row + 1, false);
                }
                self.dirty[row] = true;
            }
        }
        Ok(())
    }
}

/// A matrix in shared memory, from its descriptor.
struct Operand {
    start: u32,
    leading: u32,
    stride: u32,
    /// Bytes of a row within the swizzle pattern; 0 without one.
    swizzle: u32,
}

impl Operand {
    fn decode(bits: u64) -> Result<Operand> {
        let field = |shift: u32| ((bits >> shift & 0x3fff) << 4) as u32;
        let swizzle = [0, 128, 64, 32][(bits >> 62) as usize];
        let operand = Operand { start: field(0), leading: field(16), stride: field(32), swizzle };
        if bits >> 49 & 7 != 0 {
            return Err(Trouble::new("a wgmma descriptor with a base offset is not executed yet"));
        }
        if swizzle > 0 && !(operand.start & !127).is_multiple_of(swizzle * 8) {
            return Err(Trouble::new(format!(
                "a swizzled operand of wgmma at shared address {:#x}, not at a multiple of {}",
                operand.start,
                swizzle * 8
            )));
        }
        Ok(operand)
    }

    /// The address of eight k of a row; `chunk` counts them.
    fn address(&self, row: u32, chunk: u32) -> u32 {
        let tile = self.start + row / 8 * self.stride;
        if self.swizzle == 0 {
            return tile + chunk * self.leading + row % 8 * 16;
        }
        let plain = tile + row % 8 * self.swizzle + chunk * 16;
        plain ^ (plain >> 3 & (self.swizzle - 16))
    }

    /// Sixteen k of a row. Records the chunks that were read.
    fn row(&self, shared: &mut Shared, row: u32, who: Who, chunks: &mut Vec<u32>) -> Result<[f32; 16]> {
        let mut out = [0.0; 16];
        for chunk in 0..2 {
            let address = self.address(row, chunk);
            shared.read_by_product(address, who)?;
            chunks.push(address);
            // SAFETY: `read_by_product` has checked the address.
            let values = unsafe { shared.data(address).cast::<[u16; 8]>().read_unaligned() };
            for (k, value) in values.iter().enumerate() {
                out[chunk as usize * 8 + k] = from_bf16(*value);
            }
        }
        Ok(out)
    }
}

/// Executes an instruction of the wgmma family for one warp. A product is computed when it starts; the checks see to it that
/// its operands stay and its results are not used until it is waited for.
#[inline(never)]
pub(super) fn wgmma(
    env: &mut Env,
    core: &mut Core,
    warp: &mut Warp,
    rows: &Rows,
    i: &Instr,
    pc: usize,
) -> Result<()> {
    let products = &mut warp.products;
    match i.op {
        Op::WgmmaFence => {
            products.dirty.fill(false);
            products.fenced = true;
            return Ok(());
        }
        Op::WgmmaCommit => {
            products.groups += 1;
            return Ok(());
        }
        Op::WgmmaWait => {
            let groups = products.groups;
            let done = products.pending.extract_if(.., |pending| pending.group + i.x < groups);
            for pending in done {
                for chunk in pending.chunks {
                    core.shared.product_done(chunk);
                }
                for row in &env.kernel.lists[pending.accumulators] {
                    products.busy[*row as usize] -= 1;
                }
            }
            return Ok(());
        }
        _ => {}
    }
    if !products.fenced {
        return Err(Trouble::new("a wgmma without a wgmma.fence before it"));
    }
    // SAFETY: the operands are the instruction's.
    let (a, b) = unsafe { (*rows.get::<u64>(i.a), *rows.get::<u64>(i.b)) };
    let add = predicate(&warp.predicates, i.c);
    if a.iter().any(|x| *x != a[0]) || b.iter().any(|x| *x != b[0]) || !(add == 0 || add == u32::MAX) {
        return Err(Trouble::new("the lanes of a wgmma have different operands"));
    }
    let (group, place) = (&mut core.groups[warp.index / 4], warp.index % 4);
    let number = group.count[place];
    group.count[place] += 1;
    match group.issued.get(number) {
        None => group.issued.push((pc, a[0], b[0])),
        Some(first) if *first != (pc, a[0], b[0]) => {
            return Err(Trouble::new("the warps of a warpgroup execute different products")
                .note(format!("another warp: {}", env.kernel.place(first.0))));
        }
        Some(_) => {}
    }
    let accumulators = i.d as usize..(i.d + i.x) as usize;
    let list = &env.kernel.lists[accumulators.clone()];
    products.busy.resize(env.kernel.rows as usize + 2, 0);
    for row in list {
        if products.dirty.get(*row as usize).is_some_and(|dirty| *dirty) {
            return Err(Trouble::new(
                "an accumulator of a wgmma was written without a wgmma.fence afterwards",
            ));
        }
        products.busy[*row as usize] += 1;
    }
    let (left_operand, right_operand) = (Operand::decode(a[0])?, Operand::decode(b[0])?);
    let who = Who { warp: warp.index, lane: 0, pc };
    let mut chunks = Vec::with_capacity(2 * (16 + i.x as usize * 2));
    let mut left = [[0.0; 16]; 16];
    for (row, values) in left.iter_mut().enumerate() {
        *values = left_operand.row(&mut core.shared, (place * 16 + row) as u32, who, &mut chunks)?;
    }
    for (tile, registers) in list.chunks(4).enumerate() {
        let mut right = [[0.0; 8]; 16];
        for n in 0..8 {
            let values = right_operand.row(&mut core.shared, (tile * 8 + n) as u32, who, &mut chunks)?;
            for (k, value) in values.iter().enumerate() {
                right[k][n] = *value;
            }
        }
        let zeros = [0.0; LANES];
        // SAFETY: the operands are the instruction's.
        unsafe {
            let start = |at: usize| if add == 0 { &zeros } else { &*rows.get::<f32>(registers[at]) };
            let d = product(&left, &right, [start(0), start(1), start(2), start(3)], env.options.sums);
            for (row, values) in registers.iter().zip(d) {
                *rows.at::<f32>(*row) = values;
            }
        }
    }
    products.pending.push(Pending { group: products.groups, chunks, accumulators });
    Ok(())
}

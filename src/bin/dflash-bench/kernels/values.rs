//! Random values on a device that the host can compute too, and the comparison of results with expected
//! values.

use dflash::gpu::device::{Buffer, Device};
use dflash::{Error, Result};
use half::bf16;
use std::cell::Cell;
use std::rc::Rc;

/// Number of random values; longer arrays repeat them. A prime, so that no two rows of a matrix are equal.
const VALUES: usize = 1_048_573;
/// All copies of weights, or of keys and values, take more than this many times the L2 cache, so that a
/// launch finds none of its own copy there.
const CACHES: usize = 3;
/// Largest number of results of a launch that are checked.
const SPOTS: usize = 64;

/// Makes the inputs of kernels on one device.
pub struct BenchFixtures<'a> {
    pub device: &'a dyn Device,
    numbers: Rc<[f32]>,
    phase: Cell<usize>,
}

/// An array of random values on the device, which the host can compute too.
#[derive(Clone)]
pub struct RandomArray {
    pub buffer: Buffer,
    numbers: Rc<[f32]>,
    phase: usize,
    centre: f32,
    scale: f32,
    rounded: bool,
}

impl RandomArray {
    /// Element `i`.
    pub fn at(&self, i: usize) -> f32 {
        let x = self.centre + self.scale * self.numbers[(i + self.phase) % VALUES];
        if self.rounded { bf16::from_f32(x).to_f32() } else { x }
    }

    /// The sum mod 2^32 of the first `count` words of two bf16.
    pub fn words(&self, count: usize) -> u32 {
        let bits = |i| bf16::from_f32(self.at(i)).to_bits();
        let word = |i| u32::from(bits(2 * i)) | u32::from(bits(2 * i + 1)) << 16;
        let sum = |count| (0..count).map(word).fold(0, u32::wrapping_add);
        // The values repeat after these.
        let times = (count / VALUES) as u32;
        let whole = if times > 0 { sum(VALUES).wrapping_mul(times) } else { 0 };
        whole.wrapping_add(sum(count % VALUES))
    }
}

/// splitmix64 of a number.
fn mix(number: usize) -> u64 {
    let mut x = (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

/// Value `i` of a fixed random sequence, below `count`.
pub fn below(i: usize, count: usize) -> usize {
    ((u128::from(mix(i)) * count as u128) >> 64) as usize
}

impl<'a> BenchFixtures<'a> {
    pub fn new(device: &'a dyn Device) -> BenchFixtures<'a> {
        // About normal, with variance 1: a GPU would run at higher clocks on zeros than on weights.
        let quarter = |bits: u64| (bits & 0xffff) as f32 / 65535.0 - 0.5;
        let number = |i| {
            let bits = mix(i);
            (0..4).map(|part| quarter(bits >> (part * 16))).sum::<f32>() * 3f32.sqrt()
        };
        BenchFixtures { device, numbers: (0..VALUES).map(number).collect(), phase: Cell::new(0) }
    }

    /// Whether the device counts launches; its times mean nothing then.
    pub fn counts(&self) -> bool {
        self.device.properties().software
    }

    /// Number of copies of `bytes` bytes that have left the cache when launches that use them in turn come
    /// back to them.
    fn copies(&self, bytes: usize) -> usize {
        let l2 = usize::try_from(self.device.properties().l2).unwrap_or(usize::MAX / CACHES);
        if self.counts() { 1 } else { (CACHES * l2 / bytes.max(1) + 1).max(2) }
    }

    /// `count` f32 around `centre`.
    ///
    /// # Errors
    /// [`Error::Memory`] if the device has too little memory.
    pub fn floats(&self, count: usize, centre: f32, scale: f32, what: &str) -> Result<RandomArray> {
        Ok(self.random(count, (centre, scale, false), 1, what)?.0)
    }

    /// `count` bf16 around 0.
    ///
    /// # Errors
    /// [`Error::Memory`] if the device has too little memory.
    pub fn halves(&self, count: usize, scale: f32, what: &str) -> Result<RandomArray> {
        Ok(self.random(count, (0.0, scale, true), 1, what)?.0)
    }

    /// As [`BenchFixtures::halves`], with so many equal copies that a launch never finds its own in the
    /// cache. `together`: bytes that a launch reads with each copy, the copy included.
    ///
    /// # Errors
    /// [`Error::Memory`] if the device has too little memory.
    pub fn cold(
        &self,
        count: usize,
        scale: f32,
        together: usize,
        what: &str,
    ) -> Result<(RandomArray, Vec<Buffer>)> {
        self.random(count, (0.0, scale, true), self.copies(together), what)
    }

    fn random(
        &self,
        count: usize,
        (centre, scale, rounded): (f32, f32, bool),
        copies: usize,
        what: &str,
    ) -> Result<(RandomArray, Vec<Buffer>)> {
        let size = if rounded { 2 } else { 4 };
        let stride = (count * size).next_multiple_of(256);
        let all = self.device.allocate(stride * copies, what)?;
        let phase = self.phase.replace((self.phase.get() + 123_457) % VALUES);
        let buffer = all.slice(0, count * size)?;
        let array = RandomArray { buffer, numbers: self.numbers.clone(), phase, centre, scale, rounded };
        let first = count.min(VALUES);
        let bytes: Vec<u8> = match rounded {
            true => (0..first).flat_map(|i| bf16::from_f32(array.at(i)).to_le_bytes()).collect(),
            false => (0..first).flat_map(|i| array.at(i).to_le_bytes()).collect(),
        };
        let put = |from: usize, bytes: usize| all.slice(from, bytes);
        let whole = array.buffer.slice(0, first * size)?;
        self.device.upload(&whole, &bytes)?;
        for at in (first..count).step_by(VALUES) {
            let bytes = (count - at).min(VALUES) * size;
            self.device.copy(&put(at * size, bytes)?, &put(0, bytes)?)?;
        }
        let copies = (0..copies).map(|copy| {
            let to = all.slice(copy * stride, count * size)?;
            if copy > 0 {
                self.device.copy(&to, &array.buffer)?;
            }
            Ok(to)
        });
        let copies = copies.collect::<Result<Vec<Buffer>>>()?;
        self.device.seal(&all);
        Ok((array, copies))
    }

    /// A buffer for results, filled with 0xff: NaN, or `u32::MAX`.
    ///
    /// # Errors
    /// [`Error::Memory`] if the device has too little memory.
    pub fn output(&self, bytes: usize) -> Result<Buffer> {
        let buffer = self.device.allocate(bytes, "results")?;
        self.device.fill(&buffer, 0xff)?;
        Ok(buffer)
    }

    /// An array of bytes.
    ///
    /// # Errors
    /// [`Error::Memory`] if the device has too little memory.
    pub fn bytes(&self, bytes: &[u8]) -> Result<Buffer> {
        let buffer = self.device.allocate(bytes.len(), "a table")?;
        self.device.upload(&buffer, bytes)?;
        Ok(buffer)
    }

    /// An array of u32.
    ///
    /// # Errors
    /// [`Error::Memory`] if the device has too little memory.
    pub fn words(&self, words: impl IntoIterator<Item = u32>) -> Result<Buffer> {
        self.bytes(&words.into_iter().flat_map(u32::to_le_bytes).collect::<Vec<u8>>())
    }

    /// An array of `count` u32 zeros.
    ///
    /// # Errors
    /// [`Error::Memory`] if the device has too little memory.
    pub fn zeros(&self, count: usize) -> Result<Buffer> {
        self.words(std::iter::repeat_n(0, count))
    }
}

/// A buffer's elements of `N` bytes.
fn elements<const N: usize, T>(device: &dyn Device, from: &Buffer, of: fn([u8; N]) -> T) -> Result<Vec<T>> {
    let mut bytes = vec![0; from.bytes()];
    device.download(from, &mut bytes)?;
    let element = |chunk: &[u8]| of(std::array::from_fn(|i| chunk[i]));
    Ok(bytes.chunks_exact(N).map(element).collect())
}

pub fn floats_of(device: &dyn Device, from: &Buffer) -> Result<Vec<f32>> {
    elements(device, from, f32::from_le_bytes)
}

pub fn halves_of(device: &dyn Device, from: &Buffer) -> Result<Vec<f32>> {
    elements(device, from, |bytes| bf16::from_le_bytes(bytes).to_f32())
}

pub fn words_of(device: &dyn Device, from: &Buffer) -> Result<Vec<u32>> {
    elements(device, from, u32::from_le_bytes)
}

pub fn longs_of(device: &dyn Device, from: &Buffer) -> Result<Vec<u64>> {
    elements(device, from, u64::from_le_bytes)
}

/// Elements of a matrix to check, as (row, column): its corners and some others, or all if there are few.
pub fn spots(rows: usize, columns: usize) -> Vec<(usize, usize)> {
    if rows * columns <= SPOTS {
        return (0..rows * columns).map(|i| (i / columns, i % columns)).collect();
    }
    let corners = [(0, 0), (0, columns - 1), (rows - 1, 0), (rows - 1, columns - 1)];
    let between = (4..SPOTS).map(|i| (below(i * 2, rows), below(i * 2 + 1, columns)));
    corners.into_iter().chain(between).collect()
}

/// The first and the last of `count`, and one in between.
pub fn ends(count: usize) -> Vec<usize> {
    let mut ends = vec![0, count / 3, count - 1];
    ends.dedup();
    ends
}

/// Requires |results - expected| <= `bound` |expected|, the norms taken over all pairs of (result, expected).
///
/// # Errors
/// [`Error::Internal`] with the relative error.
pub fn close(what: &str, pairs: &[(f32, f64)], bound: f64) -> Result<()> {
    let distance: f64 = pairs.iter().map(|(got, expected)| (f64::from(*got) - expected).powi(2)).sum();
    let length: f64 = pairs.iter().map(|(_, expected)| expected.powi(2)).sum();
    let error = (distance / length).sqrt();
    // False for NaN too.
    if error <= bound {
        return Ok(());
    }
    Err(Error::Internal(format!(
        "{what}: relative error {error:.1e} of {} values, expected at most {bound:.1e}",
        pairs.len()
    )))
}

/// Requires that results are exactly as expected.
///
/// # Errors
/// [`Error::Internal`] with the first difference.
pub fn equal<T: PartialEq + std::fmt::Debug>(what: &str, got: &[T], expected: &[T]) -> Result<()> {
    let differs = got.iter().zip(expected).position(|(got, expected)| got != expected);
    match differs {
        None if got.len() == expected.len() => Ok(()),
        None => Err(Error::Internal(format!("{what}: {} values, expected {}", got.len(), expected.len()))),
        Some(i) => Err(Error::Internal(format!("{what} {i} is {:?}, expected {:?}", got[i], expected[i]))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a GPU the read ceiling reads more than [`VALUES`] values; on the software GPU it does not.
    #[test]
    fn sums_of_words_include_repeated_values() {
        let device = crate::test_gpu::TestGpu::new();
        let fixtures = BenchFixtures::new(&device);
        let count = VALUES + 4099;
        let array = fixtures.halves(2 * count, 1.0, "words").unwrap();
        let found = words_of(&device, &array.buffer).unwrap();
        assert_eq!(array.words(count), found.iter().copied().fold(0, u32::wrapping_add));
        assert_eq!(array.words(5), found[..5].iter().copied().fold(0, u32::wrapping_add));
    }
}

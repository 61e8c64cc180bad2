//! Helpers of kernel tests: the device, schedules, poisoned outputs, relative errors, bf16 and seeded data.

pub use crate::support::exhaustive;
pub use crate::support::random::Random;
use crate::support::test_gpu;
pub use crate::support::test_gpu::set_schedule;

use dflash::gpu::cuda::Cuda;
use dflash::gpu::device::{Buffer, Device};
use std::sync::Mutex;

/// The device of this thread. Each thread of tests has its own, so that tests run in parallel.
pub fn gpu() -> &'static Cuda {
    /// Devices that no thread uses.
    static FREE: Mutex<Vec<&'static Cuda>> = Mutex::new(Vec::new());
    struct Lease(&'static Cuda);
    impl Drop for Lease {
        fn drop(&mut self) {
            FREE.lock().unwrap().push(self.0);
        }
    }
    thread_local! {
        static LEASE: Lease = {
            let free = FREE.lock().unwrap().pop();
            Lease(free.unwrap_or_else(|| Box::leak(Box::new(test_gpu::open()))))
        };
    }
    let gpu = LEASE.with(|lease| lease.0);
    // tools/gpu-check.sh looks for this line.
    println!("on {}", gpu.properties().name);
    gpu
}

/// Number of random cases to run: `all` if [`exhaustive`], else `few`.
pub fn cases(few: usize, all: usize) -> usize {
    if exhaustive() { all } else { few }
}

/// Runs `test` on the GPU.
pub fn on_gpu(mut test: impl FnMut(&dyn Device)) {
    test(gpu());
}

/// Like [`on_gpu`], under schedule `turn % 5`.
pub fn on_gpu_in_turn(turn: usize, test: impl FnMut(&dyn Device)) {
    set_schedule(turn % 5);
    on_gpu(test);
}

/// The bytes that `test` returns. Asserts that they are the same in other schedules: reversed and a random one, if
/// [`exhaustive`] five in all. On a GPU, in a second run.
pub fn same_bits(test: impl Fn(&dyn Device) -> Vec<u8>) -> Vec<u8> {
    let gpu = gpu();
    let bytes = test(gpu);
    for schedule in if exhaustive() { 0..5 } else { 1..3 } {
        set_schedule(schedule);
        assert_same(&format!("schedule {schedule}"), &test(gpu), &bytes);
    }
    bytes
}

/// `exact`, the bound on the relative error of f32 sums that are rounded, or ten times that on a GPU, whose tensor
/// cores truncate.
pub fn f32_bound(exact: f64) -> f64 {
    if gpu().properties().software { exact } else { 10.0 * exact }
}

#[track_caller]
fn assert_same(what: &str, bytes: &[u8], expected: &[u8]) {
    let at = bytes.iter().zip(expected).position(|(a, b)| a != b);
    let (length, whole) = (bytes.len(), expected.len());
    assert!(
        at.is_none() && length == whole,
        "{what}: bits differ from byte {at:?} on; {length} bytes, expected {whole}"
    );
}

/// A buffer holding `data`.
pub fn upload<T: Bits>(device: &dyn Device, data: &[T]) -> Buffer {
    let bytes = to_bytes(data);
    let buffer = device.allocate(bytes.len(), "test data").unwrap();
    device.upload(&buffer, &bytes).unwrap();
    buffer
}

/// Like [`upload`], and sealed: kernels may read it before their `grid_wait`.
pub fn constant<T: Bits>(device: &dyn Device, data: &[T]) -> Buffer {
    let buffer = upload(device, data);
    device.seal(&buffer);
    buffer
}

/// A buffer for `count` elements, filled with [`POISON`].
pub fn poisoned<T: Bits>(device: &dyn Device, count: usize) -> Buffer {
    let buffer = device.allocate(count * size_of::<T>(), "test output").unwrap();
    let poison: Vec<u8> = (0..buffer.bytes()).map(|i| POISON.to_le_bytes()[i % 2]).collect();
    device.upload(&buffer, &poison).unwrap();
    buffer
}

/// The buffer's bytes.
pub fn bytes_of(device: &dyn Device, buffer: &Buffer) -> Vec<u8> {
    let mut bytes = vec![0; buffer.bytes()];
    device.download(buffer, &mut bytes).unwrap();
    bytes
}

/// The buffer's elements.
pub fn download<T: Bits>(device: &dyn Device, buffer: &Buffer) -> Vec<T> {
    from_bytes(&bytes_of(device, buffer))
}

/// Fills memory that was not written: NaN as bf16, and as f32 when repeated.
pub const POISON: u16 = 0xffa5;

/// Panics if a 32-bit word is still [`POISON`].
pub fn assert_written(bytes: &[u8], what: &str) {
    let untouched = bytes.chunks_exact(4).position(|c| c == [0xa5, 0xff, 0xa5, 0xff]);
    assert_eq!(untouched, None, "{what}: a word was never written (index in words)");
}

/// `‖out − reference‖ / ‖reference‖`, in f64. Infinite if `out` holds a NaN, so that it exceeds every bound.
pub fn relative_error(out: &[f32], reference: &[f32]) -> f64 {
    assert_eq!(out.len(), reference.len());
    let (mut difference, mut norm) = (0.0f64, 0.0f64);
    for (&o, &r) in out.iter().zip(reference) {
        difference += (f64::from(o) - f64::from(r)).powi(2);
        norm += f64::from(r).powi(2);
    }
    if difference.is_nan() { f64::INFINITY } else { (difference / norm.max(f64::MIN_POSITIVE)).sqrt() }
}

/// f32 rounded to bf16, as stored.
pub fn to_bf16(data: &[f32]) -> Vec<u16> {
    data.iter().map(|&x| half::bf16::from_f32(x).to_bits()).collect()
}

/// Stored bf16 as f32.
pub fn from_bf16(data: &[u16]) -> Vec<f32> {
    data.iter().map(|&x| half::bf16::from_bits(x).to_f32()).collect()
}

/// Numbers that convert to little-endian bytes and back.
pub trait Bits: Copy {
    fn put(self, to: &mut Vec<u8>);
    fn take(from: &[u8]) -> Self;
}
macro_rules! bits {
    ($($t:ty),*) => {$(
        impl Bits for $t {
            fn put(self, to: &mut Vec<u8>) {
                to.extend(self.to_le_bytes());
            }
            fn take(from: &[u8]) -> Self {
                <$t>::from_le_bytes(from.try_into().unwrap())
            }
        }
    )*};
}
bits!(u8, u16, u32, u64, i32, i64, f32);

pub fn to_bytes<T: Bits>(data: &[T]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size_of_val(data));
    data.iter().for_each(|x| x.put(&mut bytes));
    bytes
}

pub fn from_bytes<T: Bits>(bytes: &[u8]) -> Vec<T> {
    bytes.chunks_exact(size_of::<T>()).map(T::take).collect()
}

impl Random {
    /// Like [`Random::normals`], as bf16.
    pub fn bf16(&mut self, count: usize, scale: f32) -> Vec<u16> {
        to_bf16(&self.normals(count, scale))
    }
}

/// A random row of valid logits: no NaN, no +infinity, not all -infinity. The kinds cover ties, masked
/// tokens, one dominant token, signed zeros, values that differ in the last bits, and bf16 rounding.
pub fn valid_logits(random: &mut Random, vocab: usize) -> Vec<f32> {
    let mut row = match random.below(10) {
        0 => vec![random.normal(5.0); vocab],
        1 => (0..vocab).map(|_| (random.normal(2.0) * 2.0).round() / 2.0).collect(),
        2 => (0..vocab)
            .map(|_| if random.below(3) == 0 { f32::NEG_INFINITY } else { random.normal(4.0) })
            .collect(),
        3 => (0..vocab).map(|_| if random.below(2) == 0 { 0.0 } else { -0.0 }).collect(),
        4 => {
            // One dominant token.
            let mut row = random.normals(vocab, 1.0);
            row[random.below(vocab)] = 60.0;
            row
        }
        5 => (0..vocab).map(|_| f32::from_bits(random.next() as u32 & 0xbfff_ffff)).collect(),
        // Values that differ in their last bits, just below 20: many weights are equal, few logits are.
        6 => (0..vocab).map(|_| f32::from_bits(20f32.to_bits() - random.below(40) as u32)).collect(),
        7 => (0..vocab).map(|id| -(id as f32) / 16.0).collect(),
        _ => random.normals(vocab, 6.0),
    };
    // Logits of a bf16 head often tie at the top.
    if random.below(4) == 0 {
        row = from_bf16(&to_bf16(&row));
    }
    if row.iter().all(|&logit| logit == f32::NEG_INFINITY) {
        row[random.below(vocab)] = 1.0;
    }
    row
}

/// Like [`valid_logits`]; some rows are invalid (NaN, +infinity, all -infinity) or hold the largest f32.
pub fn logits(random: &mut Random, vocab: usize) -> Vec<f32> {
    let mut row = valid_logits(random, vocab);
    match random.below(24) {
        0 => row[random.below(vocab)] = f32::NAN,
        1 => row[random.below(vocab)] = f32::INFINITY,
        2 => row.fill(f32::NEG_INFINITY),
        3 => row[random.below(vocab)] = f32::MAX,
        _ => (),
    }
    row
}

/// The keys that the LM head writes for a row of logits, one per 128 ids: the best logit as an ascending
/// number, then the complement of its id, so that the maximum is the lowest id of the best logit. All ones if
/// a logit is NaN or infinite.
pub fn best_keys(logits: &[f32]) -> Vec<u64> {
    let keys: Vec<u64> = logits.iter().enumerate().map(token_key).collect();
    keys.chunks(128).filter_map(|keys| keys.iter().copied().max()).collect()
}

/// As [`best_keys`], of as many blocks of ids that are not consecutive, as a reduced vocabulary has.
pub fn best_keys_of_scattered_ids(logits: &[f32]) -> Vec<u64> {
    let blocks = logits.len().div_ceil(128);
    let keys: Vec<u64> = logits.iter().enumerate().map(token_key).collect();
    (0..blocks).filter_map(|block| keys.iter().skip(block).step_by(blocks).copied().max()).collect()
}

/// The LM head's key of a token.
fn token_key((id, logit): (usize, &f32)) -> u64 {
    if logit.is_nan() || *logit == f32::INFINITY {
        return u64::MAX;
    }
    let bits = i64::from((logit + 0.0).to_bits().cast_signed());
    // Sign and magnitude as a number that ascends with the float.
    let ascending = if bits < 0 { -1 - (bits & 0x7fff_ffff) } else { bits } + (1 << 31);
    ((ascending as u64) << 32) | u64::from(!(id as u32))
}

//! Helpers of kernel tests: available devices, the five schedules, poisoned outputs, relative errors, bf16
//! and seeded data.
//!
//! Tests run on the emulator, and also on a GPU if one opens. Under `softgpu run` that GPU is the software GPU,
//! which takes the emulator's place, with the same five schedules. Bits are compared between runs on one device.
//! Only kernels that compute with integers or round once must give equal bits on different devices.

pub use crate::support::exhaustive;
use crate::support::random;

use dflash::gpu::cuda::Cuda;
use dflash::gpu::device::{Buffer, Device};
use dflash::gpu::emulator::{Emulator, Schedule};
pub use random::Random;
use std::ffi::{CString, c_char};
use std::sync::{Mutex, OnceLock};

/// The first GPU, if one opens. All tests of a program share the device; of the software GPU, each thread has a
/// stream of its own, so that tests run in parallel.
pub fn gpu() -> Option<&'static dyn Device> {
    static GPU: OnceLock<Option<Cuda>> = OnceLock::new();
    // The driver cannot start in the address space that AddressSanitizer leaves free.
    let open = || if cfg!(feature = "sanitize") { None } else { Cuda::open(0).ok() };
    let gpu = GPU.get_or_init(open).as_ref()?;
    // tools/gpu-check.sh looks for this line.
    println!("on {}", gpu.properties().name);
    if !is_software(gpu) {
        return Some(gpu);
    }
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
            Lease(free.unwrap_or_else(|| Box::leak(Box::new(Cuda::open(0).unwrap()))))
        };
    }
    Some(LEASE.with(|lease| lease.0))
}

fn is_software(device: &dyn Device) -> bool {
    device.properties().name.starts_with("software GPU")
}

/// Makes the software GPU take a schedule from the next launch on, in all threads.
fn set_software_schedule(schedule: usize) {
    type SetOption = unsafe extern "C" fn(*const c_char, *const c_char) -> i32;
    let value = CString::new(schedule.to_string()).unwrap();
    // SAFETY: the driver is loaded, and has this function with these types.
    let code = unsafe {
        let driver = libloading::Library::new("libcuda.so.1").unwrap();
        driver.get::<SetOption>(b"softgpuSetOption").unwrap()(c"schedule".as_ptr(), value.as_ptr())
    };
    assert_eq!(code, 0);
}

/// Number of random cases to run: `all` if [`exhaustive`], else `few`; 1 in 20 of `all` under the
/// sanitizers.
pub fn cases(few: usize, all: usize) -> usize {
    if cfg!(feature = "sanitize") {
        (all / 20).max(1)
    } else if exhaustive() {
        all
    } else {
        few
    }
}

/// Runs `test` on an emulator, then on the GPU.
pub fn every_device(test: impl FnMut(&dyn Device)) {
    every_device_in_turn(0, test);
}

/// Like [`every_device`]; the emulator or the software GPU takes schedule `turn % 5`.
pub fn every_device_in_turn(turn: usize, mut test: impl FnMut(&dyn Device)) {
    let gpu = gpu();
    if gpu.is_some_and(is_software) {
        set_software_schedule(turn % 5);
    } else {
        let device = Emulator::new();
        device.set_schedule(Schedule::ALL[turn % 5]);
        test(&device);
    }
    if let Some(gpu) = gpu {
        test(gpu);
    }
}

/// The bytes that `test` returns on each device, the emulator's first. Asserts that all schedules of the
/// emulator or the software GPU give the same bytes, and that two runs on a GPU do.
pub fn bits_of_every_device(test: impl Fn(&dyn Device) -> Vec<u8>) -> Vec<Vec<u8>> {
    let Some(gpu) = gpu() else { return vec![five_schedules(|device| test(device))] };
    let bytes = test(gpu);
    if is_software(gpu) {
        // In order, reversed, and random ones.
        let schedules = if exhaustive() { 0..5 } else { 1..3 };
        for schedule in schedules {
            set_software_schedule(schedule);
            assert_same(&format!("schedule {schedule}"), &test(gpu), &bytes);
        }
        return vec![bytes];
    }
    assert_same("a second run on the GPU", &test(gpu), &bytes);
    vec![five_schedules(|device| test(device)), bytes]
}

/// Like [`bits_of_every_device`], for a kernel whose bits must be equal on all devices.
pub fn same_bits(test: impl Fn(&dyn Device) -> Vec<u8>) -> Vec<u8> {
    let mut all = bits_of_every_device(test);
    let first = all.remove(0);
    all.iter().for_each(|bytes| assert_same("the GPU", bytes, &first));
    first
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

/// Runs `test` on a fresh emulator under each of the five schedules (with sanitizers, which look at addresses:
/// under the first only, exhaustive: all). Asserts that the bytes are equal and returns them.
pub fn five_schedules(test: impl Fn(&Emulator) -> Vec<u8>) -> Vec<u8> {
    let mut first: Option<Vec<u8>> = None;
    let schedules = if cfg!(feature = "sanitize") && !exhaustive() { 1 } else { 5 };
    for &schedule in &Schedule::ALL[..schedules] {
        let device = Emulator::new();
        device.set_schedule(schedule);
        let bytes = test(&device);
        match &first {
            None => first = Some(bytes),
            Some(first) => assert_same(&format!("{schedule:?}"), &bytes, first),
        }
    }
    first.unwrap_or_default()
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
    let key = |(id, logit): (usize, &f32)| {
        if logit.is_nan() || *logit == f32::INFINITY {
            return u64::MAX;
        }
        let bits = i64::from((logit + 0.0).to_bits().cast_signed());
        // Sign and magnitude as a number that ascends with the float.
        let ascending = if bits < 0 { -1 - (bits & 0x7fff_ffff) } else { bits } + (1 << 31);
        ((ascending as u64) << 32) | u64::from(!(id as u32))
    };
    let keys: Vec<u64> = logits.iter().enumerate().map(key).collect();
    keys.chunks(128).filter_map(|keys| keys.iter().copied().max()).collect()
}

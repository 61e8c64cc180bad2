//! What kernel tests share: the five schedules, poisoned outputs, relative errors, bf16, seeded data.

#![allow(dead_code)] // each test binary uses its own part

use dflash::device::{Buffer, Device};
use dflash::emulator::{Emulator, Schedule};

/// Runs `test` once per schedule on a fresh emulator and asserts that its bytes are the same; returns them.
pub fn five_schedules(test: impl Fn(&Emulator) -> Vec<u8>) -> Vec<u8> {
    let mut first: Option<Vec<u8>> = None;
    for schedule in Schedule::ALL {
        let device = Emulator::new();
        device.set_schedule(schedule);
        let bytes = test(&device);
        match &first {
            None => first = Some(bytes),
            Some(first) => {
                let at = first.iter().zip(&bytes).position(|(a, b)| a != b);
                assert!(
                    at.is_none() && first.len() == bytes.len(),
                    "{schedule:?} gives other bits than {:?}, first at byte {at:?} of {}",
                    Schedule::ALL[0],
                    first.len()
                );
            }
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

/// As [`upload`], sealed: kernels may read it before their `grid_wait`.
pub fn constant<T: Bits>(device: &dyn Device, data: &[T]) -> Buffer {
    let buffer = upload(device, data);
    device.seal(&buffer);
    buffer
}

/// A buffer for `count` elements, full of poison.
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

/// What fills memory nobody wrote, every two bytes: NaN as bf16 and as f32.
pub const POISON: u16 = 0xffa5;

/// Panics where an element is still all poison.
pub fn assert_written(bytes: &[u8], what: &str) {
    let untouched = bytes.chunks_exact(4).position(|c| c == [0xa5, 0xff, 0xa5, 0xff]);
    assert_eq!(untouched, None, "{what}: a word that was never written (index in words)");
}

/// `‖out − reference‖ / ‖reference‖`, in f64. Infinite where `out` holds a NaN, so that every bound catches one.
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

/// Numbers of plain old data, as bytes and back.
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

/// Seeded random numbers (splitmix64).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `0..n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Uniform in [0, 1).
    pub fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u32 << 24) as f32
    }

    /// About normal, mean 0, variance `scale` squared: the sum of four uniforms.
    pub fn normal(&mut self, scale: f32) -> f32 {
        let sum: f32 = (0..4).map(|_| self.unit() - 0.5).sum();
        sum * scale * 3f32.sqrt()
    }

    pub fn normals(&mut self, count: usize, scale: f32) -> Vec<f32> {
        (0..count).map(|_| self.normal(scale)).collect()
    }

    /// As [`Random::normals`], as bf16.
    pub fn bf16(&mut self, count: usize, scale: f32) -> Vec<u16> {
        to_bf16(&self.normals(count, scale))
    }
}

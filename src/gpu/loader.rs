//! Weights from checkpoints to a device, in two steps: memory is allocated while what shall come is listed, then one
//! thread reads the files in order while this one converts, uploads and packs. Knows files and layouts, not models.
//!
//! Files are read by position, not through their mapping, so that one that became shorter is an error and no signal.
//! Host memory: [`PIECES`] pieces of [`PIECE`] bytes and one more for conversion, whatever the model; on the device
//! [`Loader::passing`] bytes beside the weights.

use crate::checkpoint::config::Rope;
use crate::checkpoint::safetensors::{Checkpoint, Dtype, Tensor};
use crate::cpu::simd::widen;
use crate::gpu::device::{Buffer, Device};
use crate::gpu::kernels::linear::Shape;
use crate::gpu::kernels::pack::{Pack, RowMap};
use crate::gpu::kernels::swiglu::Swiglu;
use crate::{Error, Result};
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::thread;

/// Bytes of a file read at once.
pub const PIECE: usize = 16 << 20;
/// Pieces that are being read, waiting and on their way to the device.
pub const PIECES: usize = 3;
/// Bytes of rows packed at once, unless one row is longer.
const BATCH: usize = 16 << 20;
/// Elements converted at once: they stay in the first-level cache.
const BLOCK: usize = 2048;

/// Which packed rows a matrix takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// Those from this one on.
    From(usize),
    /// Those of the gates in [`Swiglu::gate_up_rows`].
    Gates,
    /// And those of the ups.
    Ups,
}

/// Weights that have their memory and wait for their bytes. Buffers it gave out hold nothing before [`Loader::run`].
#[must_use = "buffers stay empty until `run`"]
pub struct Loader<'a> {
    device: &'a dyn Device,
    file: &'a Checkpoint,
    jobs: Vec<Job>,
    rotations: Vec<Rotations>,
    filled: Vec<Buffer>,
}

/// One tensor's way.
struct Job {
    tensor: Tensor,
    out: Buffer,
    to: To,
}

#[derive(Clone, Copy)]
enum To {
    /// Rows of a packed layer.
    Packed(Shape, Rows),
    /// bf16, rows in order.
    Table,
    /// f32
    Vector,
}

/// A table of angles, which comes from no file.
struct Rotations {
    out: Buffer, // [positions][head_dim] f32
    rope: Rope,
    head_dim: usize,
}

/// Elements `at..at + count` of a job's tensor, in the first of `bytes`.
struct Piece {
    job: usize,
    at: usize,
    count: usize,
    bytes: Vec<u8>,
}

impl Job {
    fn elements(&self) -> usize {
        self.tensor.shape.iter().product()
    }

    fn file_bytes(&self) -> usize {
        self.elements() * self.tensor.dtype.size()
    }

    /// Elements that one launch packs, whole rows; all of a tensor that is not packed.
    fn batch(&self) -> usize {
        match self.to {
            To::Packed(Shape { k, .. }, _) => self.elements().min((BATCH / (k * 2)).max(1) * k),
            To::Table | To::Vector => self.elements(),
        }
    }

    /// First element and number of elements of each piece; none reaches into a second batch.
    fn pieces(&self) -> impl Iterator<Item = (usize, usize)> {
        let (elements, batch, most) = (self.elements(), self.batch(), PIECE / self.tensor.dtype.size());
        let mut end = 0;
        std::iter::from_fn(move || {
            let at = end;
            end = elements.min(at + most).min((at / batch + 1) * batch);
            (end > at).then_some((at, end - at))
        })
    }
}

impl<'a> Loader<'a> {
    /// What is asked for is in `file`.
    pub fn new(device: &'a dyn Device, file: &'a Checkpoint) -> Loader<'a> {
        Loader { device, file, jobs: vec![], rotations: vec![], filled: vec![] }
    }

    /// What is asked for from now on is in `file`.
    pub fn turn_to(&mut self, file: &'a Checkpoint) {
        self.file = file;
    }

    fn allocate(&mut self, bytes: usize, what: &str) -> Result<Buffer> {
        let buffer = self.device.allocate(bytes, what)?;
        self.filled.push(buffer.clone());
        Ok(buffer)
    }

    /// `[len]` as f32.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`] and [`Device::allocate`].
    pub fn vector(&mut self, name: &str, len: usize) -> Result<Buffer> {
        let tensor = self.file.tensor(name, &[len])?;
        let out = self.allocate(len * 4, name)?;
        self.jobs.push(Job { tensor, out: out.clone(), to: To::Vector });
        Ok(out)
    }

    /// `[rows][columns]` as bf16.
    ///
    /// # Errors
    /// As [`Loader::vector`].
    pub fn table(&mut self, name: &str, rows: usize, columns: usize) -> Result<Buffer> {
        let tensor = self.file.tensor(name, &[rows, columns])?;
        let out = self.allocate(rows * columns * 2, name)?;
        self.jobs.push(Job { tensor, out: out.clone(), to: To::Table });
        Ok(out)
    }

    /// A layer's packed weights from matrices of these names, numbers of rows and places.
    ///
    /// # Errors
    /// As [`Loader::vector`].
    pub fn packed(&mut self, layer: Shape, matrices: &[(String, usize, Rows)]) -> Result<Buffer> {
        let what = matrices.first().map_or("weights", |m| m.0.as_str());
        let out = self.allocate(layer.weight_bytes(), what)?;
        for (name, rows, place) in matrices {
            let tensor = self.file.tensor(name, &[*rows, layer.k])?;
            self.jobs.push(Job { tensor, out: out.clone(), to: To::Packed(layer, *place) });
        }
        Ok(out)
    }

    /// `[positions][head_dim]` f32: cosines, then sines of every position.
    ///
    /// # Errors
    /// As [`Device::allocate`].
    pub fn rotations(&mut self, rope: &Rope, head_dim: usize, positions: usize) -> Result<Buffer> {
        let out = self.allocate(positions * head_dim * 4, "rotations")?;
        self.rotations.push(Rotations { out: out.clone(), rope: rope.clone(), head_dim });
        Ok(out)
    }

    /// Bytes that will be read.
    pub fn file_bytes(&self) -> usize {
        self.jobs.iter().map(Job::file_bytes).sum()
    }

    /// Bytes of device memory that [`Loader::run`] takes and gives back: rows on their way, and their places.
    pub fn passing(&self) -> usize {
        let (rows, places) = self.passing_parts();
        rows + places
    }

    fn passing_parts(&self) -> (usize, usize) {
        self.jobs.iter().fold((0, 0), |(rows, places), job| match job.to {
            To::Packed(_, Rows::From(_)) => (rows.max(job.batch() * 2), places),
            To::Packed(layer, _) => (rows.max(job.batch() * 2), places.max(job.batch() / layer.k * 4)),
            To::Table | To::Vector => (rows, places),
        })
    }

    /// Fills every buffer. `progress` hears how many bytes of how many have been read and sent, first and last too.
    ///
    /// # Errors
    /// [`Error::Model`] with file and tensor for a file that became shorter or cannot be read, for a NaN or an
    /// infinity, and for a number beyond the range of bf16; else what the device says.
    pub fn run(mut self, progress: &mut dyn FnMut(usize, usize)) -> Result<()> {
        let total = self.file_bytes();
        let mut done = 0;
        progress(done, total);
        // In the order of the files, whatever the order of the model.
        self.jobs.sort_by(|a, b| a.tensor.place().cmp(&b.tensor.place()));
        let (rows, places) = self.passing_parts();
        let mut sending = Sending {
            device: self.device,
            rows: self.device.allocate(rows, "rows of weights on their way")?,
            places: self.device.allocate(places, "places of weights on their way")?,
            converted: Vec::new(),
        };
        self.rotations.iter().try_for_each(|r| sending.rotations(r))?;
        let jobs = &self.jobs;
        let largest = jobs.iter().map(Job::file_bytes).max().unwrap_or(0).min(PIECE);
        thread::scope(|scope| {
            let (give_back, empty) = channel();
            let (give, full) = sync_channel(PIECES);
            for _ in 0..PIECES {
                let _ = give_back.send(vec![0; largest]);
            }
            thread::Builder::new()
                .name("weights".to_string())
                .spawn_scoped(scope, move || read(jobs, &empty, &give))
                .map_err(|e| Error::Internal(format!("no thread to read weights with: {e}")))?;
            for piece in &full {
                let piece = piece?;
                let job = &jobs[piece.job];
                sending.send(job, &piece)?;
                done += piece.count * job.tensor.dtype.size();
                progress(done, total);
                // Fails where the reader has ended.
                let _ = give_back.send(piece.bytes);
            }
            Ok(())
        })?;
        if done != total {
            return Err(Error::Internal(format!("{done} of {total} bytes of weights were read")));
        }
        self.filled.iter().for_each(|buffer| self.device.seal(buffer));
        self.device.synchronize()
    }
}

/// The reading thread: until all is read, something is wrong, or nobody takes it any more.
fn read(jobs: &[Job], empty: &Receiver<Vec<u8>>, full: &SyncSender<Result<Piece>>) {
    for (number, job) in jobs.iter().enumerate() {
        let size = job.tensor.dtype.size();
        for (at, count) in job.pieces() {
            let Ok(mut bytes) = empty.recv() else { return };
            let read = job.tensor.read(at * size, &mut bytes[..count * size]);
            let wrong = read.is_err();
            if full.send(read.map(|()| Piece { job: number, at, count, bytes })).is_err() || wrong {
                return;
            }
        }
    }
}

/// What turns pieces into device memory.
struct Sending<'a> {
    device: &'a dyn Device,
    rows: Buffer,   // a batch of rows, bf16
    places: Buffer, // u32 for each of them
    converted: Vec<u8>,
}

impl Sending<'_> {
    fn send(&mut self, job: &Job, piece: &Piece) -> Result<()> {
        let (tensor, at, end) = (&job.tensor, piece.at, piece.at + piece.count);
        let bytes = &piece.bytes[..piece.count * tensor.dtype.size()];
        let sent = match (job.to, tensor.dtype) {
            (To::Vector, dtype) => to_f32(dtype, bytes, &mut self.converted).map(|()| &*self.converted),
            (_, Dtype::Bf16) => finite(bytes).map(|()| bytes),
            (_, dtype) => to_bf16(dtype, bytes, &mut self.converted).map(|()| &*self.converted),
        };
        let sent = sent.map_err(|i| spoiled(tensor, at + i, bytes, i))?;
        let To::Packed(layer, rows) = job.to else {
            let to = job.out.slice(at * (sent.len() / piece.count), sent.len())?;
            return self.device.upload(&to, sent);
        };
        let begin = at / job.batch() * job.batch();
        self.device.upload(&self.rows.slice((at - begin) * 2, sent.len())?, sent)?;
        if end == job.elements() || end.is_multiple_of(job.batch()) {
            self.pack(job, layer, rows, begin / layer.k, end / layer.k)?;
        }
        Ok(())
    }

    /// Packs rows `first..end` of a matrix, which are in `self.rows`.
    fn pack(&self, job: &Job, layer: Shape, rows: Rows, first: usize, end: usize) -> Result<()> {
        let pack = Pack { rows: end - first, layer };
        let place = |row| match rows {
            Rows::From(start) => start + row,
            Rows::Gates => Swiglu::gate_up_rows(row).0,
            Rows::Ups => Swiglu::gate_up_rows(row).1,
        };
        if let Rows::From(_) = rows {
            return pack.launch(self.device, &job.out, &self.rows, &RowMap::From(place(first)));
        }
        let bytes: Vec<u8> = (first..end).flat_map(|row| (place(row) as u32).to_le_bytes()).collect();
        let places = self.places.slice(0, bytes.len())?;
        self.device.upload(&places, &bytes)?;
        pack.launch(self.device, &job.out, &self.rows, &RowMap::At(&places))
    }

    /// Angles are f32 products, as in the reference implementation.
    fn rotations(&mut self, r: &Rotations) -> Result<()> {
        let (frequencies, magnitude) = r.rope.frequencies();
        let row = r.head_dim * 4;
        let (positions, at_once) = (r.out.bytes() / row, (PIECE / row).max(1));
        for first in (0..positions).step_by(at_once) {
            self.converted.clear();
            for position in first..positions.min(first + at_once) {
                let angle = |f: &f64| f64::from(position as f32 * *f as f32);
                let mut put = |x: f64| self.converted.extend(((x * magnitude) as f32).to_le_bytes());
                frequencies.iter().for_each(|f| put(angle(f).cos()));
                frequencies.iter().for_each(|f| put(angle(f).sin()));
            }
            let to = r.out.slice(first * row, self.converted.len())?;
            self.device.upload(&to, &self.converted)?;
        }
        Ok(())
    }
}

// ---- conversion: an error is the first element that cannot be ----

/// Magnitudes as f32 bits from which on they are infinite or NaN, as they are and rounded to bf16.
const INFINITE: u32 = 0x7f80_0000;
const BEYOND_BF16: u32 = 0x7f7f_8000;

/// Whether all of bf16 `bytes` are finite.
fn finite(bytes: &[u8]) -> std::result::Result<(), usize> {
    let bad = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]) & 0x7fff >= 0x7f80;
    for (number, block) in bytes.chunks(BLOCK * 2).enumerate() {
        // Without a way out, so that it runs as fast as memory.
        if block.chunks_exact(2).fold(false, |any, b| any | bad(b)) {
            let within = block.chunks_exact(2).position(bad).unwrap_or(0);
            return Err(number * BLOCK + within);
        }
    }
    Ok(())
}

/// `bytes` as f32.
fn to_f32(dtype: Dtype, bytes: &[u8], out: &mut Vec<u8>) -> std::result::Result<(), usize> {
    convert(dtype, bytes, out, INFINITE, u32::to_le_bytes)
}

/// `bytes` as bf16, rounded to nearest, ties to even.
fn to_bf16(dtype: Dtype, bytes: &[u8], out: &mut Vec<u8>) -> std::result::Result<(), usize> {
    // Below the limit nothing wraps; a check for it would keep the loop from becoming vectors.
    let round = |x: u32| (x.wrapping_add(0x7fff).wrapping_add(x >> 16 & 1) >> 16) as u16;
    convert(dtype, bytes, out, BEYOND_BF16, |x| round(x).to_le_bytes())
}

/// What `put` makes of the bits of each element as f32, magnitudes below `limit`.
fn convert<const N: usize>(
    dtype: Dtype,
    bytes: &[u8],
    out: &mut Vec<u8>,
    limit: u32,
    put: impl Fn(u32) -> [u8; N],
) -> std::result::Result<(), usize> {
    out.resize(bytes.len() / dtype.size() * N, 0);
    let mut wide = [0.0; BLOCK];
    let blocks = bytes.chunks(BLOCK * dtype.size()).zip(out.chunks_mut(BLOCK * N));
    for (number, (block, out)) in blocks.enumerate() {
        let wide = &mut wide[..block.len() / dtype.size()];
        match dtype {
            Dtype::F16 => wide.iter_mut().zip(block.chunks_exact(2)).for_each(|(x, b)| *x = f16(b)),
            _ => widen(block, dtype, wide),
        }
        let bad = |x: &f32| x.to_bits() & 0x7fff_ffff >= limit;
        if wide.iter().fold(false, |any, x| any | bad(x)) {
            return Err(number * BLOCK + wide.iter().position(bad).unwrap_or(0));
        }
        out.chunks_exact_mut(N).zip(wide).for_each(|(to, x)| to.copy_from_slice(&put(x.to_bits())));
    }
    Ok(())
}

/// f16 as f32, without a branch so that a loop of it becomes vectors.
fn f16(b: &[u8]) -> f32 {
    let bits = u32::from(u16::from_le_bytes([b[0], b[1]]));
    let magnitude = bits & 0x7fff;
    // Exponents are 112 apart; the product makes normal numbers of subnormal ones.
    let finite = (f32::from_bits(magnitude << 13) * f32::from_bits((112 + 127) << 23)).to_bits();
    let special = if magnitude >= 0x7c00 { INFINITE } else { 0 };
    f32::from_bits(finite | special | (bits & 0x8000) << 16)
}

/// The sentence for element `at` of a tensor, which is element `within` of `bytes`.
fn spoiled(tensor: &Tensor, at: usize, bytes: &[u8], within: usize) -> Error {
    let size = tensor.dtype.size();
    let mut value = [0.0];
    widen(&bytes[within * size..][..size], tensor.dtype, &mut value);
    let place = match tensor.shape[..] {
        [_, columns] => format!("[{}, {}]", at / columns, at % columns),
        _ => format!("[{at}]"),
    };
    let what = match value[0] {
        x if x.is_nan() => "is NaN, expected are finite weights".to_string(),
        x if x.is_infinite() => "is infinite, expected are finite weights".to_string(),
        x => format!("is {x:e}, beyond the range of BF16, which is what the device's weights are"),
    };
    Error::Model(format!("{}: element {place} {what}", tensor.label()))
}

//! Loads weights from checkpoints to a device, in two steps. First the caller lists the tensors, and their
//! device memory is allocated. Then one thread reads the files in order while the calling thread converts,
//! uploads and packs. This module knows files and layouts, not models.
//!
//! Files are read with `pread`, not through their mapping, so that a file that became shorter gives an error
//! and not a SIGBUS. The host memory is [`READ_BUFFERS`] buffers of up to [`READ_BYTES`] and one for
//! conversion. The device needs [`Loader::staging_bytes`] in addition to the weights.

use crate::checkpoint::config::Rope;
use crate::checkpoint::safetensors::{Checkpoint, Dtype, Tensor};
use crate::cpu::simd::widen;
use crate::gpu::device::{Buffer, Device};
use crate::gpu::kernels::convolve::Convolve;
use crate::gpu::kernels::linear::Shape;
use crate::gpu::kernels::pack::{Pack, RowMap};
use crate::gpu::kernels::swiglu::Swiglu;
use crate::{Error, Result};
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::thread;

/// The most bytes of a file read at once.
pub const READ_BYTES: usize = 16 << 20;
/// Number of read buffers: one is read into, one waits, one is uploaded.
pub const READ_BUFFERS: usize = 3;
/// The most bytes of bf16 rows packed by one launch, unless one row is longer.
const PACK_BYTES: usize = 16 << 20;
/// Elements converted at once, so that they stay in the L1 cache.
const BLOCK: usize = 2048;

/// The rows of a packed layer that a matrix fills.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PackedRows {
    /// Consecutive rows from this one on.
    From(usize),
    /// The rows of the gate projection, interleaved by [`Swiglu::gate_up_rows`].
    Gates,
    /// The rows of the up projection, interleaved by [`Swiglu::gate_up_rows`].
    Ups,
    /// The rows of a projection whose heads of so many dimensions are queries, then gates: the queries of all heads
    /// from row 0 on, the gates from this row on.
    QueriesAndGates(usize, usize),
    /// The rows of the projection to the coefficients of convolutions with so many taps and groups, permuted by
    /// [`Convolve::packed_row`].
    Coefficients(usize, usize),
}

/// A list of weights to load. Their device memory is allocated when they are listed, and [`Loader::run`]
/// fills it. Until then the contents of the returned buffers are undefined.
#[must_use = "the buffers are undefined until `run`"]
pub struct Loader<'a> {
    device: &'a dyn Device,
    file: &'a Checkpoint,
    jobs: Vec<Job>,
    rope_tables: Vec<RopeTable>,
    /// Every allocation; `run` seals them.
    buffers: Vec<Buffer>,
}

/// One tensor to load.
struct Job {
    tensor: Tensor,
    out: Buffer,
    format: Format,
}

/// How a tensor is stored on the device.
#[derive(Clone, Copy)]
enum Format {
    /// As these rows of a packed layer.
    Packed(Shape, PackedRows),
    /// bf16, row-major.
    Table,
    /// f32.
    Vector,
    /// f32, 1 more than in the file.
    Offset,
}

/// A RoPE table, which is computed and not read from a file.
struct RopeTable {
    out: Buffer, // [positions][dims] f32
    rope: Rope,
    dims: usize,
}

/// Elements `at..at + count` of a job's tensor, in the file's format, at the start of `bytes`.
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

    /// Elements that one launch packs: whole rows. All elements for a tensor that is not packed.
    fn batch(&self) -> usize {
        match self.format {
            Format::Packed(Shape { k, .. }, _) => self.elements().min((PACK_BYTES / (k * 2)).max(1) * k),
            Format::Table | Format::Vector | Format::Offset => self.elements(),
        }
    }

    /// First element and number of elements of each piece. A piece never spans two batches.
    fn pieces(&self) -> impl Iterator<Item = (usize, usize)> {
        let (elements, batch, largest) =
            (self.elements(), self.batch(), READ_BYTES / self.tensor.dtype.size());
        let mut end = 0;
        std::iter::from_fn(move || {
            let at = end;
            end = elements.min(at + largest).min((at / batch + 1) * batch);
            (end > at).then_some((at, end - at))
        })
    }
}

impl<'a> Loader<'a> {
    /// A loader that looks up tensors in `file`.
    pub fn new(device: &'a dyn Device, file: &'a Checkpoint) -> Loader<'a> {
        Loader { device, file, jobs: vec![], rope_tables: vec![], buffers: vec![] }
    }

    /// Looks up tensors in `file` from now on.
    pub fn switch_to(&mut self, file: &'a Checkpoint) {
        self.file = file;
    }

    fn allocate(&mut self, bytes: usize, what: &str) -> Result<Buffer> {
        let buffer = self.device.allocate(bytes, what)?;
        self.buffers.push(buffer.clone());
        Ok(buffer)
    }

    /// Allocates and lists a vector `[len]`, stored as f32.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`] and [`Device::allocate`].
    pub fn vector(&mut self, name: &str, len: usize) -> Result<Buffer> {
        self.tensor(name, &[len])
    }

    /// As [`Loader::vector`], of the gain of a norm; `offset`: 1 more than in the file.
    ///
    /// # Errors
    /// As [`Loader::vector`].
    pub fn gain(&mut self, name: &str, len: usize, offset: bool) -> Result<Buffer> {
        self.list(name, &[len], if offset { Format::Offset } else { Format::Vector })
    }

    /// As [`Loader::vector`], of a tensor of this shape.
    ///
    /// # Errors
    /// As [`Loader::vector`].
    pub fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Buffer> {
        self.list(name, shape, Format::Vector)
    }

    fn list(&mut self, name: &str, shape: &[usize], format: Format) -> Result<Buffer> {
        let tensor = self.file.tensor(name, shape)?;
        let out = self.allocate(shape.iter().product::<usize>() * 4, name)?;
        self.jobs.push(Job { tensor, out: out.clone(), format });
        Ok(out)
    }

    /// As [`Loader::vector`], of several vectors `[len]`, one after the other.
    ///
    /// # Errors
    /// As [`Loader::vector`].
    pub fn vectors(&mut self, names: &[String], len: usize) -> Result<Buffer> {
        let all = self.allocate(names.len() * len * 4, &names.join(", "))?;
        for (i, name) in names.iter().enumerate() {
            let (tensor, out) = (self.file.tensor(name, &[len])?, all.slice(i * len * 4, len * 4)?);
            self.jobs.push(Job { tensor, out, format: Format::Vector });
        }
        Ok(all)
    }

    /// Allocates and lists a matrix `[rows][columns]`, stored as row-major bf16.
    ///
    /// # Errors
    /// As [`Loader::vector`].
    pub fn table(&mut self, name: &str, rows: usize, columns: usize) -> Result<Buffer> {
        let tensor = self.file.tensor(name, &[rows, columns])?;
        let out = self.allocate(rows * columns * 2, name)?;
        self.jobs.push(Job { tensor, out: out.clone(), format: Format::Table });
        Ok(out)
    }

    /// Allocates a table of numbers that is not a tensor, and uploads it.
    ///
    /// # Errors
    /// As [`Device::allocate`].
    pub fn numbers(&mut self, what: &str, numbers: &[u32]) -> Result<Buffer> {
        let out = self.allocate(numbers.len() * 4, what)?;
        self.device.upload(&out, &numbers.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>())?;
        Ok(out)
    }

    /// Allocates the packed weights of a layer and lists its matrices: name, number of rows, and the packed
    /// rows that they fill.
    ///
    /// # Errors
    /// As [`Loader::vector`].
    pub fn packed(&mut self, layer: Shape, matrices: &[(String, usize, PackedRows)]) -> Result<Buffer> {
        let what = matrices.first().map_or("weights", |m| m.0.as_str());
        let out = self.allocate(layer.weight_bytes(), what)?;
        for (name, rows, place) in matrices {
            let tensor = self.file.tensor(name, &[*rows, layer.k])?;
            self.jobs.push(Job { tensor, out: out.clone(), format: Format::Packed(layer, *place) });
        }
        Ok(out)
    }

    /// Allocates and lists a RoPE table `[positions][dims]` f32 of the `dims` dimensions that RoPE rotates: for each
    /// position the cosines, then the sines.
    ///
    /// # Errors
    /// As [`Device::allocate`].
    pub fn rope_table(&mut self, rope: &Rope, dims: usize, positions: usize) -> Result<Buffer> {
        let out = self.allocate(positions * dims * 4, "a RoPE table")?;
        self.rope_tables.push(RopeTable { out: out.clone(), rope: rope.clone(), dims });
        Ok(out)
    }

    /// Bytes that [`Loader::run`] reads from files.
    pub fn file_bytes(&self) -> usize {
        self.jobs.iter().map(Job::file_bytes).sum()
    }

    /// Bytes of device memory that [`Loader::run`] allocates and frees again: rows to pack, and the packed
    /// row of each.
    pub fn staging_bytes(&self) -> usize {
        let (rows, row_map) = self.staging_parts();
        rows + row_map
    }

    fn staging_parts(&self) -> (usize, usize) {
        self.jobs.iter().fold((0, 0), |(rows, row_map), job| match job.format {
            Format::Packed(_, PackedRows::From(_)) => (rows.max(job.batch() * 2), row_map),
            Format::Packed(layer, _) => (rows.max(job.batch() * 2), row_map.max(job.batch() / layer.k * 4)),
            Format::Table | Format::Vector | Format::Offset => (rows, row_map),
        })
    }

    /// Fills every buffer. Calls `progress` with the bytes loaded so far and the total, at the start and
    /// after each piece.
    ///
    /// # Errors
    /// [`Error::Model`] with file and tensor for a file that became shorter or cannot be read, for a NaN or
    /// an infinity, and for a number beyond the range of bf16; otherwise the device's error.
    pub fn run(mut self, progress: &mut dyn FnMut(usize, usize)) -> Result<()> {
        let total = self.file_bytes();
        let mut done = 0;
        progress(done, total);
        // Read the files sequentially; the model lists its tensors in another order.
        self.jobs.sort_by(|a, b| a.tensor.location().cmp(&b.tensor.location()));
        let (rows, row_map) = self.staging_parts();
        let mut uploader = Uploader {
            device: self.device,
            rows: self.device.allocate(rows, "rows of weights to pack")?,
            row_map: self.device.allocate(row_map, "the row map of weights to pack")?,
            converted: Vec::new(),
        };
        self.rope_tables.iter().try_for_each(|table| uploader.rope_table(table))?;
        let jobs = &self.jobs;
        let largest = jobs.iter().map(Job::file_bytes).max().unwrap_or(0).min(READ_BYTES);
        thread::scope(|scope| {
            let (recycle, empty) = channel();
            let (deliver, full) = sync_channel(READ_BUFFERS);
            for _ in 0..READ_BUFFERS {
                let _ = recycle.send(vec![0; largest]);
            }
            thread::Builder::new()
                .name("weights".to_string())
                .spawn_scoped(scope, move || read(jobs, &empty, &deliver))
                .map_err(|e| Error::Internal(format!("no thread to read weights with: {e}")))?;
            for piece in &full {
                let piece = piece?;
                let job = &jobs[piece.job];
                uploader.upload(job, &piece)?;
                done += piece.count * job.tensor.dtype.size();
                progress(done, total);
                // This fails once the reader has ended, which is expected.
                let _ = recycle.send(piece.bytes);
            }
            Ok(())
        })?;
        if done != total {
            return Err(Error::Internal(format!("{done} of {total} bytes of weights were read")));
        }
        self.buffers.iter().for_each(|buffer| self.device.seal(buffer));
        self.device.synchronize()
    }
}

/// The reading thread. It ends when everything is read, a read fails, or the receiver is gone.
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

/// Converts pieces, uploads them and packs them.
struct Uploader<'a> {
    device: &'a dyn Device,
    rows: Buffer,    // [rows of a batch][k] bf16
    row_map: Buffer, // [rows of a batch] u32: packed row of each
    converted: Vec<u8>,
}

impl Uploader<'_> {
    fn upload(&mut self, job: &Job, piece: &Piece) -> Result<()> {
        let (tensor, at, end) = (&job.tensor, piece.at, piece.at + piece.count);
        let bytes = &piece.bytes[..piece.count * tensor.dtype.size()];
        let converted = match (job.format, tensor.dtype) {
            (Format::Vector, dtype) => to_f32(dtype, bytes, &mut self.converted).map(|()| &*self.converted),
            (Format::Offset, dtype) => {
                let add = |x: u32| (f32::from_bits(x) + 1.0).to_le_bytes();
                convert(dtype, bytes, &mut self.converted, INFINITE, add).map(|()| &*self.converted)
            }
            (_, Dtype::Bf16) => finite(bytes).map(|()| bytes),
            (_, dtype) => to_bf16(dtype, bytes, &mut self.converted).map(|()| &*self.converted),
        };
        let converted = converted.map_err(|i| bad_element(tensor, at + i, bytes, i))?;
        let Format::Packed(layer, rows) = job.format else {
            let to = job.out.slice(at * (converted.len() / piece.count), converted.len())?;
            return self.device.upload(&to, converted);
        };
        let begin = at / job.batch() * job.batch();
        self.device.upload(&self.rows.slice((at - begin) * 2, converted.len())?, converted)?;
        if end == job.elements() || end.is_multiple_of(job.batch()) {
            self.pack(job, layer, rows, begin / layer.k, end / layer.k)?;
        }
        Ok(())
    }

    /// Packs rows `first..end` of a matrix from `self.rows`.
    fn pack(&self, job: &Job, layer: Shape, rows: PackedRows, first: usize, end: usize) -> Result<()> {
        let pack = Pack { rows: end - first, layer };
        let packed_row = |row| match rows {
            PackedRows::From(start) => start + row,
            PackedRows::Gates => Swiglu::gate_up_rows(row).0,
            PackedRows::Ups => Swiglu::gate_up_rows(row).1,
            PackedRows::QueriesAndGates(dim, gates) => {
                let (head, within) = (row / (2 * dim), row % (2 * dim));
                head * dim + if within < dim { within } else { gates + within - dim }
            }
            PackedRows::Coefficients(taps, groups) => Convolve::packed_row(taps, groups, row),
        };
        if let PackedRows::From(_) = rows {
            return pack.launch(self.device, &job.out, &self.rows, &RowMap::From(packed_row(first)));
        }
        let bytes: Vec<u8> = (first..end).flat_map(|row| (packed_row(row) as u32).to_le_bytes()).collect();
        let row_map = self.row_map.slice(0, bytes.len())?;
        self.device.upload(&row_map, &bytes)?;
        pack.launch(self.device, &job.out, &self.rows, &RowMap::At(&row_map))
    }

    /// Computes and uploads a RoPE table. Angles are products in f32, as in Hugging Face transformers.
    fn rope_table(&mut self, table: &RopeTable) -> Result<()> {
        let (frequencies, magnitude) = table.rope.frequencies();
        let row = table.dims * 4;
        let (positions, at_once) = (table.out.bytes() / row, (READ_BYTES / row).max(1));
        for first in (0..positions).step_by(at_once) {
            self.converted.clear();
            for position in first..positions.min(first + at_once) {
                let angle = |f: &f64| f64::from(position as f32 * *f as f32);
                let mut put = |x: f64| self.converted.extend(((x * magnitude) as f32).to_le_bytes());
                frequencies.iter().for_each(|f| put(angle(f).cos()));
                frequencies.iter().for_each(|f| put(angle(f).sin()));
            }
            let to = table.out.slice(first * row, self.converted.len())?;
            self.device.upload(&to, &self.converted)?;
        }
        Ok(())
    }
}

// ---- conversion; an error is the index of the first element that cannot be converted ----

/// f32 bits of the smallest magnitude that is infinite or NaN.
const INFINITE: u32 = 0x7f80_0000;
/// f32 bits of the smallest magnitude that rounds to infinity as bf16.
const BEYOND_BF16: u32 = 0x7f7f_8000;

/// Checks that all bf16 values in `bytes` are finite.
fn finite(bytes: &[u8]) -> std::result::Result<(), usize> {
    let bad = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]) & 0x7fff >= 0x7f80;
    for (number, block) in bytes.chunks(BLOCK * 2).enumerate() {
        // The fold has no early exit, so it is vectorized and runs at memory speed.
        if block.chunks_exact(2).fold(false, |any, b| any | bad(b)) {
            let within = block.chunks_exact(2).position(bad).unwrap_or(0);
            return Err(number * BLOCK + within);
        }
    }
    Ok(())
}

/// Converts `bytes` to f32.
fn to_f32(dtype: Dtype, bytes: &[u8], out: &mut Vec<u8>) -> std::result::Result<(), usize> {
    convert(dtype, bytes, out, INFINITE, u32::to_le_bytes)
}

/// Converts `bytes` to bf16, rounded to nearest, ties to even.
fn to_bf16(dtype: Dtype, bytes: &[u8], out: &mut Vec<u8>) -> std::result::Result<(), usize> {
    // Finite values do not wrap. The wrapping addition avoids overflow checks, which prevent vectorization.
    let round = |x: u32| (x.wrapping_add(0x7fff).wrapping_add(x >> 16 & 1) >> 16) as u16;
    convert(dtype, bytes, out, BEYOND_BF16, |x| round(x).to_le_bytes())
}

/// Converts each element to f32 and writes the result of `put` for its bits. The magnitude of every element
/// must be below `limit` (f32 bits).
fn convert<const N: usize>(
    dtype: Dtype,
    bytes: &[u8],
    out: &mut Vec<u8>,
    limit: u32,
    put: impl Fn(u32) -> [u8; N],
) -> std::result::Result<(), usize> {
    out.resize(bytes.len() / dtype.size() * N, 0);
    let mut widened = [0.0; BLOCK];
    let blocks = bytes.chunks(BLOCK * dtype.size()).zip(out.chunks_mut(BLOCK * N));
    for (number, (block, out)) in blocks.enumerate() {
        let widened = &mut widened[..block.len() / dtype.size()];
        match dtype {
            Dtype::F16 => widened.iter_mut().zip(block.chunks_exact(2)).for_each(|(x, b)| *x = f16(b)),
            _ => widen(block, dtype, widened),
        }
        let bad = |x: &f32| x.to_bits() & 0x7fff_ffff >= limit;
        if widened.iter().fold(false, |any, x| any | bad(x)) {
            return Err(number * BLOCK + widened.iter().position(bad).unwrap_or(0));
        }
        out.chunks_exact_mut(N).zip(widened).for_each(|(to, x)| to.copy_from_slice(&put(x.to_bits())));
    }
    Ok(())
}

/// f16 to f32 without a branch, so that loops over it are vectorized.
fn f16(b: &[u8]) -> f32 {
    let bits = u32::from(u16::from_le_bytes([b[0], b[1]]));
    let magnitude = bits & 0x7fff;
    // The exponent biases differ by 112; the product also normalizes subnormal numbers.
    let finite = (f32::from_bits(magnitude << 13) * f32::from_bits((112 + 127) << 23)).to_bits();
    let special = if magnitude >= 0x7c00 { INFINITE } else { 0 };
    f32::from_bits(finite | special | (bits & 0x8000) << 16)
}

/// The error for element `at` of a tensor, which is element `within` of `bytes`.
fn bad_element(tensor: &Tensor, at: usize, bytes: &[u8], within: usize) -> Error {
    let size = tensor.dtype.size();
    let mut value = [0.0];
    widen(&bytes[within * size..][..size], tensor.dtype, &mut value);
    let place = match tensor.shape[..] {
        [_, columns] => format!("[{}, {}]", at / columns, at % columns),
        _ => format!("[{at}]"),
    };
    let what = match value[0] {
        x if x.is_nan() => "is NaN, expected a finite number".to_string(),
        x if x.is_infinite() => "is infinite, expected a finite number".to_string(),
        x => format!("is {x:e}, beyond the range of BF16, the format of weights on the device"),
    };
    Error::Model(format!("{}: element {place} {what}", tensor.label()))
}

//! `cuda/model/delta_net.cu`: Gated DeltaNet between its two projections, and the recurrent state of sequences.
//!
//! A layer keeps one state per sequence, which follows the positions `0..length` of the sequence's header, and two
//! sets of windows and records: a pass reads those of the last pass from one and writes its own to the other. So the
//! blocks of a launch never read what another one writes. Nothing has to be cleared for a new sequence: the kernel
//! takes the state before position 0 as zeros.

use super::SPAN_BYTES;
use super::check::{Check, u32s};
use crate::Result;
use crate::gpu::device::{Arg, Buffer, Device, Kernel};

/// Dimensions of a query, a key and a value.
pub const HEAD_DIM: usize = 128;
/// Rows that precede a pass in its convolution.
pub const WINDOW: usize = 3;
/// Most rows of a round.
const MAX_ROWS: usize = 64;
/// Rows that a block computes together.
const TILE: usize = 16;

/// `Head::Shared` of `cuda/model/delta_net.cu`.
const SHARED: u32 = ((MAX_ROWS + 3 * TILE + 3 * WINDOW) * HEAD_DIM * 4 + MAX_ROWS * 4 + TILE * 4) as u32;

static CORE: Kernel = Kernel { file: "delta_net", name: "delta_net", threads: 512, max_shared: SHARED };
static ADVANCE: Kernel = Kernel { file: "delta_net", name: "delta_net_advance", threads: 64, max_shared: 0 };

/// A `StateHeader`: which position the states of a sequence precede, and which rows may follow them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateHeader {
    /// The states follow positions `0..length`.
    pub length: usize,
}

impl StateHeader {
    /// Bytes on the device.
    pub const BYTES: usize = 16 + MAX_ROWS;

    /// Reads the first word of a header.
    pub fn from_bytes(bytes: &[u8; StateHeader::BYTES]) -> StateHeader {
        StateHeader { length: u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize }
    }
}

/// The Gated DeltaNet layers of a model and the states of a batch.
#[derive(Debug, Clone, Copy)]
pub struct DeltaNet {
    /// Heads of queries and keys, at least 1.
    pub key_heads: usize,
    /// Heads of values, a multiple of `key_heads`.
    pub value_heads: usize,
    /// Sequences that have a state.
    pub sequences: usize,
    /// Records of a sequence: most rows of a round, 1 to 64.
    pub records: usize,
    /// Columns of the input, a multiple of 4.
    pub pitch: usize,
    /// Of the norm of the outputs.
    pub eps: f32,
}

/// What a layer keeps of all sequences. The kernel leaves nothing undefined that it reads later.
pub struct LayerState {
    /// `[sequences][value_heads][8][512]` float4: elements 16j + 4t to 16j + 4t + 4 of column c of a head's state
    /// are at `[j][4c + t]`.
    pub state: Buffer,
    /// `[2][sequences][3][channels]` bf16
    pub windows: Buffer,
    /// `[2][sequences][records][channels]` bf16: the inputs of the convolution
    pub inputs: Buffer,
    /// `[2][sequences][records][key_heads][128]` f32
    pub keys: Buffer,
    /// `[2][sequences][records][value_heads][128]` f32
    pub deltas: Buffer,
    /// `[2][sequences][records][value_heads]` f32
    pub decays: Buffer,
}

/// The weights of a layer besides its projections, f32.
pub struct Weights<'a> {
    /// `[channels][4]`, the last tap for the row itself.
    pub convolution: &'a Buffer,
    /// `[value_heads]`
    pub a_log: &'a Buffer,
    /// `[value_heads]`
    pub dt_bias: &'a Buffer,
    /// `[128]`
    pub norm: &'a Buffer,
}

/// The rows of a pass.
#[derive(Clone, Copy)]
pub struct PassRows<'a> {
    /// Sequences of the pass.
    pub sequences: usize,
    /// Rows of each, at most [`DeltaNet::records`] in a round.
    pub block: usize,
    /// `[sequences]` `Span`. Its rows follow position `context`.
    pub spans: &'a Buffer,
    /// `[sequences][block]` u64: the ancestors of a tree's row and the row itself; `None` for chains.
    pub masks: Option<&'a Buffer>,
    /// The sequence whose prompt the rows are; `sequences` is 1. `None`: a round of sequences 0, 1, 2...
    pub prompt: Option<usize>,
}

impl DeltaNet {
    fn channels(&self) -> usize {
        (2 * self.key_heads + self.value_heads) * HEAD_DIM
    }

    /// Columns of the input: channels of q, k and v, then z, b and a.
    pub fn columns(&self) -> usize {
        self.channels() + self.value_heads * (HEAD_DIM + 2)
    }

    /// Bytes of the buffers of a [`LayerState`], in the order of its fields.
    fn sizes(&self) -> [usize; 6] {
        let &DeltaNet { key_heads, value_heads, sequences, records, .. } = self;
        let (channels, records) = (self.channels(), 2 * sequences * records);
        [
            sequences * value_heads * HEAD_DIM * HEAD_DIM * 4,
            2 * sequences * WINDOW * channels * 2,
            records * channels * 2,
            records * key_heads * HEAD_DIM * 4,
            records * value_heads * HEAD_DIM * 4,
            records * value_heads * 4,
        ]
    }

    /// Allocates what a layer keeps. Its contents are undefined.
    ///
    /// # Errors
    /// [`crate::Error::Memory`] if the device has too little memory; [`crate::Error::Internal`] for sizes that the
    /// kernel does not support.
    pub fn allocate(&self, device: &dyn Device) -> Result<LayerState> {
        self.check(&Check("delta_net"))?;
        let [state, windows, inputs, keys, deltas, decays] = self.sizes();
        let get = |bytes| device.allocate(bytes, "recurrent states");
        Ok(LayerState {
            state: get(state)?,
            windows: get(windows)?,
            inputs: get(inputs)?,
            keys: get(keys)?,
            deltas: get(deltas)?,
            decays: get(decays)?,
        })
    }

    /// Bytes that a round must move for sequences with this many rows each, `accepted` of them repeated from the last
    /// round: states read and written, inputs, outputs, and records written and read.
    pub fn bytes(&self, rows: &[usize], accepted: &[usize]) -> u64 {
        let (key, value) = (self.key_heads * HEAD_DIM, self.value_heads * HEAD_DIM);
        let record = (key + value + self.value_heads) * 4;
        let state = 2 * value * HEAD_DIM * 4 + 2 * WINDOW * self.channels() * 2;
        let row = self.columns() * 4 + value * 2 + record + self.channels() * 2;
        let (rows_of_all, repeated): (usize, usize) = (rows.iter().sum(), accepted.iter().sum());
        (rows.len() * state + rows_of_all * row + repeated * record) as u64
    }

    fn check(&self, check: &Check) -> Result<()> {
        let &DeltaNet { key_heads, value_heads, sequences, records, pitch, .. } = self;
        check.that(
            key_heads > 0 && value_heads.is_multiple_of(key_heads) && (1..=1024).contains(&value_heads),
            format_args!("{value_heads} value heads on {key_heads} key heads"),
            "a multiple, up to 1024",
        )?;
        check.that(
            pitch >= self.columns() && pitch.is_multiple_of(4),
            format_args!("rows of {pitch}"),
            format_args!("a multiple of 4, at least {}", self.columns()),
        )?;
        check.blocks(sequences, records)
    }

    fn check_pass(&self, check: &Check, headers: &Buffer, pass: &PassRows) -> Result<()> {
        self.check(check)?;
        let &PassRows { sequences, block, prompt, .. } = pass;
        let within = prompt.map_or(sequences <= self.sequences && block <= self.records, |sequence| {
            sequences == 1 && sequence < self.sequences && block < 1 << 16
        });
        check.that(
            within && sequences > 0 && block > 0,
            format_args!("{sequences} sequences of {block} rows (prompt: {prompt:?})"),
            format_args!("{} sequences of up to {} rows, or one prompt", self.sequences, self.records),
        )?;
        check.aligned("headers", headers, self.sequences * StateHeader::BYTES)?;
        check.at_least("spans", pass.spans, sequences * SPAN_BYTES)
    }

    /// Runs a layer from `input` `[rows][pitch]` f32 to `out` `[rows][value_heads][128]` bf16, where rows are
    /// `sequences * block` of the pass; those beyond a span are not written. `headers` `[sequences]` [`StateHeader`];
    /// they, spans and masks may hold any value.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if a buffer is too small or a size is out of range; device errors.
    #[allow(clippy::too_many_arguments)]
    pub fn launch(
        &self,
        device: &dyn Device,
        out: &Buffer,
        input: &Buffer,
        layer: &LayerState,
        headers: &Buffer,
        weights: &Weights,
        pass: &PassRows,
    ) -> Result<()> {
        let check = Check("delta_net");
        self.check_pass(&check, headers, pass)?;
        let rows = pass.sequences * pass.block;
        let LayerState { state, windows, inputs, keys, deltas, decays } = layer;
        let kept = [state, windows, inputs, keys, deltas, decays];
        for (buffer, bytes) in kept.iter().zip(self.sizes()) {
            check.aligned("a part of the state", buffer, bytes)?;
        }
        check.aligned("out", out, rows * self.value_heads * HEAD_DIM * 2)?;
        check.aligned("the input", input, rows * self.pitch * 4)?;
        check.optional("masks", pass.masks, rows * 8)?;
        check.aligned("convolution", weights.convolution, self.channels() * 16)?;
        check.at_least("a_log", weights.a_log, self.value_heads * 4)?;
        check.at_least("dt_bias", weights.dt_bias, self.value_heads * 4)?;
        check.aligned("norm", weights.norm, HEAD_DIM * 4)?;
        let mut args: Vec<Arg> = [out, input].into_iter().chain(kept).map(Arg::from).collect();
        args.extend([headers, pass.spans].map(Arg::from));
        args.push(super::check::or_null(pass.masks));
        let Weights { convolution, a_log, dt_bias, norm } = weights;
        args.extend([convolution, a_log, dt_bias, norm].map(|weight| Arg::from(*weight)));
        args.extend(u32s([pass.block, self.key_heads, self.value_heads, self.records, self.pitch]));
        args.extend(u32s([self.sequences, pass.prompt.unwrap_or(0), usize::from(pass.prompt.is_some())]));
        args.push(self.eps.into());
        device.launch(&CORE, [self.value_heads as u32, pass.sequences as u32, 1], SHARED, &args)
    }

    /// Ends a pass, after its last layer. `accepted`: the path of each sequence `[sequences][block]` u32, of a round;
    /// `None` after a prompt, whose rows are all accepted. Sequences without rows keep their headers.
    ///
    /// # Errors
    /// As [`DeltaNet::launch`].
    pub fn advance(
        &self,
        device: &dyn Device,
        headers: &Buffer,
        pass: &PassRows,
        accepted: Option<&Buffer>,
    ) -> Result<()> {
        let check = Check("delta_net_advance");
        self.check_pass(&check, headers, pass)?;
        check.that(
            accepted.is_none() == pass.prompt.is_some(),
            "accepted rows of a prompt",
            "those of a round",
        )?;
        check.optional("accepted", accepted, pass.sequences * pass.block * 4)?;
        let mut args: Vec<Arg> = [headers, pass.spans].map(Arg::from).to_vec();
        args.push(super::check::or_null(accepted));
        args.extend(u32s([pass.block, pass.prompt.unwrap_or(0)]));
        device.launch(&ADVANCE, [pass.sequences as u32, 1, 1], 0, &args)
    }
}

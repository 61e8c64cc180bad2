//! `cuda/spec/round.cu`: the state of sequences between rounds, the tables of a round's passes, and the ring
//! of records.
//!
//! The host writes a [`Sequence`] before its first round and reads [`Record`]s. While the sequence runs, the
//! device updates the state. The host then writes only [`Sequence::rows`], and zeros [`Sequence::active`] to
//! remove the sequence.

use super::check::{Check, args, or_null, u32s};
use super::verify::VerifyOutput;
use super::{ROW_BYTES, SPAN_BYTES};
use crate::gpu::device::{Arg, Buffer, Device, Kernel, Pinned};
use crate::spec::config::VerifyMethod;
use crate::spec::sampling::SamplingParams;
use crate::{Error, Result};

static BEGIN: Kernel = Kernel { file: "round", name: "round_begin", threads: 64, max_shared: 0 };
static TOKENS: Kernel = Kernel { file: "round", name: "round_tokens", threads: 64, max_shared: 0 };
static FINISH: Kernel = Kernel { file: "round", name: "round_finish", threads: 32, max_shared: 0 };

/// Bytes of [`Tables::round_header`].
const HEADER_BYTES: usize = 12;

/// Maximum stop ids that the device checks. The host checks the others.
pub const STOP_IDS: usize = 11;

/// Whether and why a sequence has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// It has not ended.
    Running,
    /// A stop id was emitted; it is the last token.
    Stop,
    /// The token budget is used up.
    Length,
    /// The context is full.
    Context,
    /// The target's logits for the next token are invalid.
    InvalidTarget,
    /// The drafter's logits for a draft are invalid.
    InvalidDrafter,
}

impl Finish {
    const ALL: [Finish; 6] = [
        Finish::Running,
        Finish::Stop,
        Finish::Length,
        Finish::Context,
        Finish::InvalidTarget,
        Finish::InvalidDrafter,
    ];

    fn from_word(word: u32) -> Result<Finish> {
        Finish::ALL.get(word as usize).copied().ok_or_else(|| {
            Error::Internal(format!("a sequence's state has finish code {word}, expected 0 to 5"))
        })
    }
}

/// The shape of a sequence's drafts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DraftShape {
    /// One chain.
    Chain,
    /// The tree of the most probable prefixes: [`crate::spec::tree::Tree::best_first`].
    BestFirst,
    /// A tree of sampled tokens. Its shape is [`crate::spec::tree::shape`], or [`crate::spec::tree::chains`]
    /// if the method is `block`.
    SampledTree,
}

/// The state of a sequence on the device: `Sequence` of `cuda/common/state.cuh`, word for word.
#[derive(Debug, Clone, PartialEq)]
pub struct Sequence {
    /// Takes part in rounds.
    pub active: bool,
    /// Positions `0..length` are in the target's pages.
    pub length: u32,
    /// The token at position `length`: emitted, but not yet run by the target.
    pub anchor: u32,
    /// The features of the last `pending` of those positions are not yet in the drafter's cache. They are the
    /// accepted rows of the last verification.
    pub pending: u32,
    /// Tokens that may still be emitted.
    pub budget: u32,
    /// The sequence's positions are `0..end`; the token at the last one is never run.
    pub end: u32,
    /// The drafter's positions are `0..draft_end`; 0 without a drafter.
    pub draft_end: u32,
    /// Maximum number of rows of a block, anchor included, 1 to 64; 1 for autoregressive decoding.
    pub block: u32,
    /// Maximum number of rows to verify, of a block or a tree, anchor included, 1 to 64.
    pub rows: u32,
    /// The shape of its drafts.
    pub form: DraftShape,
    /// How its tokens are sampled.
    pub sampling: SamplingParams,
    /// At most [`STOP_IDS`] ids; each ends the answer.
    pub stop_ids: Vec<u32>,
    /// The drafts before the first whose confidence is below this are verified; 0: all.
    pub min_confidence: f32,
    /// Whether and why it has ended.
    pub finish: Finish,
    /// Rounds that it took part in.
    pub rounds: u32,
    /// Drafts that were verified.
    pub drafted: u32,
    /// Drafts that were accepted.
    pub accepted: u32,
    /// How its drafts are verified.
    pub verify_method: VerifyMethod,
}

impl Sequence {
    /// Bytes of a sequence on the device.
    pub const BYTES: usize = 128;
    /// Offset of the byte that holds [`Sequence::rows`].
    pub const ROWS_OFFSET: usize = 29;

    /// The state's word for the size of rounds: `block` in bits 0 to 7, `rows` in bits 8 to 15, `form` from
    /// bit 16 on.
    pub fn shape(&self) -> u32 {
        self.block.min(64) | self.rows.clamp(1, 64) << 8 | (self.form as u32) << 16
    }

    /// The sequence's bytes on the device. The first four are `active`: zeros there remove the sequence from
    /// rounds.
    ///
    /// # Errors
    /// [`Error::Internal`] if there are more than [`STOP_IDS`] stop ids.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        if self.stop_ids.len() > STOP_IDS {
            return Err(Error::Internal(format!(
                "a sequence has {} stop ids, expected at most {STOP_IDS}",
                self.stop_ids.len()
            )));
        }
        let (settings, seed) = (self.sampling.settings(), self.sampling.seed);
        let mut words = vec![
            u32::from(self.active),
            self.length,
            self.anchor,
            self.pending,
            self.budget,
            self.end,
            self.draft_end,
            self.shape(),
            settings.c.to_bits(),
            settings.top_k,
            settings.top_p,
            settings.min_p,
            seed as u32,
            (seed >> 32) as u32,
            self.sampling.stream,
            self.finish as u32,
        ];
        words.extend(&self.stop_ids);
        words.resize(16 + STOP_IDS, u32::MAX);
        words.push(self.min_confidence.to_bits());
        words.extend([self.rounds, self.drafted, self.accepted, self.verify_method as u32]);
        Ok(words.into_iter().flat_map(u32::to_le_bytes).collect())
    }

    /// This sequence with all fields that rounds change taken from `bytes`, the state on the device.
    ///
    /// # Errors
    /// [`Error::Internal`] if the bytes are not those of a sequence.
    pub fn updated(&self, bytes: &[u8]) -> Result<Sequence> {
        if bytes.len() != Sequence::BYTES {
            return Err(Error::Internal(format!(
                "{} bytes of a sequence's state, expected {}",
                bytes.len(),
                Sequence::BYTES
            )));
        }
        let word = |i: usize| bytes[i * 4..][..4].iter().rev().fold(0, |word, &b| word << 8 | u32::from(b));
        Ok(Sequence {
            active: word(0) != 0,
            length: word(1),
            anchor: word(2),
            pending: word(3),
            budget: word(4),
            finish: Finish::from_word(word(15))?,
            rounds: word(28),
            drafted: word(29),
            accepted: word(30),
            ..self.clone()
        })
    }
}

/// The result of a round for a sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// Emitted tokens; none if the sequence took no part.
    pub tokens: Vec<u32>,
    /// Number of accepted drafts, plus 1 for the token after them, before stop ids and limits cut the answer.
    pub acceptance_length: u32,
    /// Whether and why the sequence ended.
    pub finish: Finish,
    /// Drafts that were verified.
    pub drafted: u32,
    /// Bit `i` is set if row `i` of the verification is on the accepted path; bit 0 is the anchor.
    pub path: u64,
}

/// The kernels between the passes of a round.
#[derive(Debug, Clone, Copy)]
pub struct Round {
    /// Sequences, 1 to 1024.
    pub sequences: usize,
    /// Rows of a block, 1 to 64.
    pub block: usize,
    /// Rows per sequence in the verification pass, of a block or a tree, 1 to 64.
    pub max_verify_rows: usize,
}

/// The tables of a round's passes; [`Round::begin`] writes them.
#[derive(Debug, Clone, Copy)]
pub struct Tables<'a> {
    /// `[sequences][block]` u32: the drafter's input, anchor and mask tokens; `u32::MAX` is padding.
    pub draft_tokens: &'a Buffer,
    /// `[2][sequences][block]` `Row`: first those of the pending features, then those of the block, with the
    /// drafter's positions and slots.
    pub draft_rows: &'a Buffer,
    /// `[sequences][block]` u32: the row of the last verification pass that each pending feature comes from;
    /// `u32::MAX` is padding.
    pub features: &'a Buffer,
    /// `[sequences]` `Span` of the drafter's pass; no rows if nothing is drafted.
    pub draft_spans: &'a Buffer,
    /// `[sequences][max_verify_rows]` `Row` of the verification pass.
    pub verify_rows: &'a Buffer,
    /// `[sequences]` `Span` of the verification pass.
    pub verify_spans: &'a Buffer,
    /// `[3]` u32: the round's number, 0 before the first; the number of active sequences; rows per sequence
    /// of the last verification, which [`Round::finish`] writes.
    pub round_header: &'a Buffer,
}

/// The records of the last few rounds, in pinned memory that the host reads without waiting.
pub struct Ring {
    /// `[rounds][sequences]` records.
    pub memory: Pinned,
    sequences: usize,
    max_verify_rows: usize,
    rounds: usize,
}

impl Round {
    /// Bytes that a launch of [`Round::begin`] must move.
    pub fn begin_bytes(&self) -> u64 {
        (self.sequences * (48 + self.block * 44 + self.max_verify_rows * 16)) as u64
    }

    /// Bytes that a launch of [`Round::tokens`] must move.
    pub fn tokens_bytes(&self) -> u64 {
        (self.sequences * (12 + self.max_verify_rows * 8)) as u64
    }

    /// Bytes that a launch of [`Round::finish`] must move if all drafts are accepted.
    pub fn finish_bytes(&self) -> u64 {
        (self.sequences * (180 + self.max_verify_rows * 12)) as u64
    }

    /// Writes the tables. `sequences` `[sequences]` [`Sequence`]. `path` `[sequences][columns]` u32: the
    /// path of the last verification, with as many columns as `tables.round_header` says. Without `drafts`
    /// every sequence takes an AR step. `mask`: the drafter's mask token. `anchor_row`: the row of a block
    /// that holds the anchor, 0, or 1 if the anchor's row predicts the first draft. Row `i` is for draft `i`
    /// in both cases.
    ///
    /// # Errors
    /// [`Error::Internal`] if a buffer is too small or a size is out of range; device errors.
    #[allow(clippy::too_many_arguments)] // the kernel's arguments
    pub fn begin(
        &self,
        device: &dyn Device,
        tables: Tables<'_>,
        sequences: &Buffer,
        path: &Buffer,
        drafts: bool,
        mask: u32,
        anchor_row: usize,
    ) -> Result<()> {
        let Round { sequences: count, block, max_verify_rows: rows } = *self;
        let Tables {
            draft_tokens,
            draft_rows,
            features,
            draft_spans,
            verify_rows,
            verify_spans,
            round_header,
        } = tables;
        let check = Check("round_begin");
        check.blocks(count, block)?;
        check.blocks(count, rows)?;
        check.at_least("draft_tokens", draft_tokens, count * block * 4)?;
        check.aligned("draft_rows", draft_rows, 2 * count * block * ROW_BYTES)?;
        check.at_least("features", features, count * block * 4)?;
        check.aligned("draft_spans", draft_spans, count * SPAN_BYTES)?;
        check.aligned("verify_rows", verify_rows, count * rows * ROW_BYTES)?;
        check.aligned("verify_spans", verify_spans, count * SPAN_BYTES)?;
        check.at_least("round_header", round_header, HEADER_BYTES)?;
        check.aligned("sequences", sequences, count * Sequence::BYTES)?;
        check.at_least("path", path, count * rows * 4)?;
        let columns = (path.bytes() / (count * 4)).min(64);
        let outputs =
            [draft_tokens, draft_rows, features, draft_spans, verify_rows, verify_spans, round_header];
        let buffers = outputs.into_iter().chain([sequences, path]);
        let mut args = args(buffers, [block, rows, columns, usize::from(drafts)]);
        check.that(anchor_row <= 1, format_args!("the anchor in row {anchor_row}"), "row 0 or 1")?;
        args.extend([mask.into(), (anchor_row as u32).into()]);
        device.launch(&BEGIN, [count as u32, 1, 1], 0, &args)
    }

    /// Writes the tokens of the verification pass, `tokens` `[sequences][max_verify_rows]` u32: anchor,
    /// drafts, `u32::MAX` as padding. `drafts` `[sequences][block]` u32: the drafter's choice at each row of
    /// the block; row 0 is not read. `verify_rows` and `spans` as in [`Tables`]; with `kept` `[sequences]`
    /// u32, both are shortened to that many rows. `sequences` `[sequences]` [`Sequence`].
    ///
    /// # Errors
    /// As [`Round::begin`].
    #[allow(clippy::too_many_arguments)] // the kernel's arguments
    pub fn tokens(
        &self,
        device: &dyn Device,
        tokens: &Buffer,
        drafts: &Buffer,
        verify_rows: &Buffer,
        spans: &Buffer,
        sequences: &Buffer,
        kept: Option<&Buffer>,
    ) -> Result<()> {
        let Round { sequences: count, block, max_verify_rows: rows } = *self;
        let check = Check("round_tokens");
        check.blocks(count, block)?;
        check.blocks(count, rows)?;
        check.at_least("tokens", tokens, count * rows * 4)?;
        check.at_least("drafts", drafts, count * block * 4)?;
        check.aligned("sequences", sequences, count * Sequence::BYTES)?;
        check.aligned("verify_rows", verify_rows, count * rows * ROW_BYTES)?;
        check.aligned("spans", spans, count * SPAN_BYTES)?;
        check.optional("kept", kept, count * 4)?;
        let mut args = args([tokens, drafts, verify_rows, spans, sequences], []);
        args.push(or_null(kept));
        args.extend(u32s([block, rows]));
        device.launch(&TOKENS, [count as u32, 1, 1], 0, &args)
    }

    /// Updates `sequences` `[sequences]` [`Sequence`] with the result of the verification, and writes the
    /// round's records. `round_header` as [`Round::begin`] left it. `tokens` `[sequences][max_verify_rows]`
    /// u32: the verified tokens. `spans` `[sequences]` `Span` of the verification pass. `history`: a buffer
    /// `[sequences][positions]` u32, and its positions; emitted tokens are written at their positions.
    ///
    /// # Errors
    /// As [`Round::begin`].
    #[allow(clippy::too_many_arguments)] // the kernel's arguments
    pub fn finish(
        &self,
        device: &dyn Device,
        sequences: &Buffer,
        ring: &Ring,
        round_header: &Buffer,
        output: VerifyOutput<'_>,
        tokens: &Buffer,
        spans: &Buffer,
        history: Option<(&Buffer, usize)>,
    ) -> Result<()> {
        let Round { sequences: count, max_verify_rows: rows, .. } = *self;
        let check = Check("round_finish");
        check.blocks(count, rows)?;
        check.that(
            ring.sequences >= count && ring.max_verify_rows >= rows,
            format_args!("a ring for {} sequences of {} rows", ring.sequences, ring.max_verify_rows),
            format_args!("at least {count} of {rows}"),
        )?;
        check.aligned("sequences", sequences, count * Sequence::BYTES)?;
        check.at_least("round_header", round_header, HEADER_BYTES)?;
        output.check(&check, count, rows)?;
        check.at_least("tokens", tokens, count * rows * 4)?;
        check.aligned("spans", spans, count * SPAN_BYTES)?;
        let mut args: Vec<Arg> = [sequences, &ring.memory.buffer, round_header].map(Arg::from).to_vec();
        args.extend(output.buffers().map(Arg::from));
        args.extend([tokens, spans].map(Arg::from));
        let positions = history.map_or(0, |(_, positions)| positions);
        check.optional("history", history.map(|(buffer, _)| buffer), count * positions * 4)?;
        args.push(or_null(history.map(|(buffer, _)| buffer)));
        args.extend(u32s([rows, ring.rounds, ring.sequences, record_words(ring.max_verify_rows), positions]));
        device.launch(&FINISH, [count as u32, 1, 1], 0, &args)
    }
}

impl Ring {
    /// An empty ring for the records of `rounds` rounds (1 to 65536) of up to `round.max_verify_rows` rows.
    ///
    /// # Errors
    /// [`Error::Internal`] if a size is outside the limits; device errors.
    pub fn new(device: &dyn Device, round: Round, rounds: usize) -> Result<Ring> {
        let Round { sequences, max_verify_rows, .. } = round;
        let check = Check("round_finish");
        check.blocks(sequences, max_verify_rows)?;
        let limits = 1..=1 << 16;
        check.that(limits.contains(&rounds), format_args!("a ring of {rounds} rounds"), "1 to 65536")?;
        let bytes = rounds * sequences * record_words(max_verify_rows) * 4;
        let memory = device.pinned(bytes, "the ring of results")?;
        Ok(Ring { memory, sequences, max_verify_rows, rounds })
    }

    /// The record of round number `round` (from 1) for `sequence`; `None` until the device has written it.
    ///
    /// A later round overwrites the record. So the ring must hold at least one round more than are enqueued
    /// and not yet read.
    ///
    /// # Errors
    /// [`Error::Internal`] if a later round has overwritten the record, or the record is not valid.
    pub fn read(&self, round: u32, sequence: usize) -> Result<Option<Record>> {
        if sequence >= self.sequences {
            let count = self.sequences;
            return Err(Error::Internal(format!(
                "record of sequence {sequence}, expected less than {count}"
            )));
        }
        let place = round as usize % self.rounds;
        let at = (place * self.sequences + sequence) * record_words(self.max_verify_rows) * 4;
        let word = |i: usize| self.memory.read_u32(at + i * 4);
        let overwritten = |found: u32| {
            Error::Internal(format!(
                "round {found} has overwritten the record of round {round} before it was read"
            ))
        };
        match word(0)? {
            found if found == round => {}
            0 => return Ok(None),
            found if (found.wrapping_sub(round) as i32) < 0 => return Ok(None),
            found => return Err(overwritten(found)),
        }
        let (kept, acceptance_length) = (word(1)?, word(2)?);
        if kept as usize > self.max_verify_rows {
            let most = self.max_verify_rows;
            return Err(Error::Internal(format!(
                "round {round} emitted {kept} tokens, expected at most {most}"
            )));
        }
        let tokens = (0..kept as usize).map(|i| word(8 + i)).collect::<Result<_>>()?;
        let (finish, drafted) = (Finish::from_word(word(3)?)?, word(4)?);
        let path = u64::from(word(5)?) | u64::from(word(6)?) << 32;
        match word(0)? {
            found if found == round => Ok(Some(Record { tokens, acceptance_length, finish, drafted, path })),
            found => Err(overwritten(found)),
        }
    }
}

/// Words of a record, tokens included; a multiple of 4.
fn record_words(max_verify_rows: usize) -> usize {
    (8 + max_verify_rows).next_multiple_of(4)
}

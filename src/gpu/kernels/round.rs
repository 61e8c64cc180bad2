//! `cuda/spec/round.cu`: the state of sequences between rounds, the tables of a round's passes, and the ring of its results.
//!
//! The host writes a [`Sequence`] when it joins and reads [`Record`]s; all that happens between is the device's.

use super::verify::Verdict;
use super::{aligned, at_least};
use crate::gpu::device::{Arg, Buffer, Device, Kernel, Pinned};
use crate::spec::config::VerifyMethod;
use crate::spec::sampling::SamplingParams;
use crate::{Error, Result};

static BEGIN: Kernel = Kernel { file: "round", name: "round_begin", threads: 64, max_shared: 0 };
static TOKENS: Kernel = Kernel { file: "round", name: "round_tokens", threads: 64, max_shared: 0 };
static FINISH: Kernel = Kernel { file: "round", name: "round_finish", threads: 32, max_shared: 0 };

/// Stop ids that the device looks for; further ones are for the host.
pub const STOP_IDS: usize = 12;

/// Why a sequence takes no part in rounds any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    Running,
    /// A stop id was emitted; it is the last token.
    Stop,
    /// The budget is spent.
    Length,
    /// The context is full.
    Context,
    /// The target's logits for the next token hold a NaN or infinity, or nothing but -inf.
    DamagedTarget,
    /// The same of the drafter's for a draft.
    DamagedDrafter,
}

impl Finish {
    const ALL: [Finish; 6] = [
        Finish::Running,
        Finish::Stop,
        Finish::Length,
        Finish::Context,
        Finish::DamagedTarget,
        Finish::DamagedDrafter,
    ];

    fn from_word(word: u32) -> Result<Finish> {
        Finish::ALL.get(word as usize).copied().ok_or_else(|| {
            Error::Internal(format!("a sequence's state ends with code {word}, known are 0 to 5"))
        })
    }
}

/// What a sequence drafts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Chain,
    /// The tree of the most probable prefixes.
    BestFirst,
    /// A tree of tokens that are drawn: of the shape [`crate::spec::tree::shape`], under the rule `block` [`crate::spec::tree::chains`].
    Drawn,
}

/// A sequence as the device keeps it: `Sequence` of `cuda/common/state.cuh`, word for word.
#[derive(Debug, Clone, PartialEq)]
pub struct Sequence {
    pub active: bool,
    /// Positions in the target's pages: `0..length`.
    pub length: u32,
    /// The token at position `length`, emitted and not yet run.
    pub anchor: u32,
    /// How many of those positions, the last ones, have features that the drafter has not seen: rows of the last
    /// verification's path.
    pub pending: u32,
    /// Tokens that may still be emitted.
    pub budget: u32,
    /// Positions the sequence may have, `0..end`; the token of the last is never run.
    pub end: u32,
    /// Positions the drafter may have; 0 without a drafter.
    pub draft_end: u32,
    /// Rows of a block at most, anchor included; 1 for autoregressive decoding. At most 64.
    pub block: u32,
    /// Rows that are verified at most, of a block or a tree, anchor included: 1 to 64.
    pub rows: u32,
    pub form: Form,
    pub sampling: SamplingParams,
    /// At most [`STOP_IDS`].
    pub stop_ids: Vec<u32>,
    pub finish: Finish,
    pub rounds: u32,
    pub drafted: u32,
    pub accepted: u32,
    /// Which drafts stand.
    pub rule: VerifyMethod,
}

impl Sequence {
    pub const BYTES: usize = 128;
    /// Where the byte is that says how many rows are verified at most.
    pub const ROWS_AT: usize = 29;

    /// The word that says how large rounds are.
    pub fn shape(&self) -> u32 {
        self.block.min(64) | self.rows.clamp(1, 64) << 8 | (self.form as u32) << 16
    }

    /// The bytes the device keeps. The first four are `active`: zeros written there alone take the sequence out.
    ///
    /// # Errors
    /// [`Error::Internal`] for more than [`STOP_IDS`] stop ids.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        if self.stop_ids.len() > STOP_IDS {
            return Err(Error::Internal(format!(
                "{} stop ids for a device that looks for {STOP_IDS}",
                self.stop_ids.len()
            )));
        }
        let (distribution, seed) = (self.sampling.settings(), self.sampling.seed);
        let mut words = vec![
            u32::from(self.active),
            self.length,
            self.anchor,
            self.pending,
            self.budget,
            self.end,
            self.draft_end,
            self.shape(),
            distribution.c.to_bits(),
            distribution.top_k,
            distribution.top_p,
            distribution.min_p,
            seed as u32,
            (seed >> 32) as u32,
            self.sampling.stream,
            self.finish as u32,
        ];
        words.extend(&self.stop_ids);
        words.resize(16 + STOP_IDS, u32::MAX);
        words.extend([self.rounds, self.drafted, self.accepted, self.rule as u32]);
        Ok(words.into_iter().flat_map(u32::to_le_bytes).collect())
    }

    /// This sequence as the device left it in `bytes`: what rounds change is taken from there.
    ///
    /// # Errors
    /// [`Error::Internal`] where the bytes are no sequence's.
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

/// What a round did for a sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// Tokens emitted; none where the sequence took no part.
    pub tokens: Vec<u32>,
    /// Tokens that the verdict would have emitted without limits: accepted drafts and the one after them.
    pub judged: u32,
    pub finish: Finish,
    /// Drafts that were verified.
    pub drafted: u32,
    /// Bit `i`: row `i` of the verification is on the verdict's path.
    pub stood: u64,
}

/// The round's own kernels, for `sequences` sequences (at most 1024) in blocks of `block` rows, of which `wide` are
/// verified, or of a tree so many (at most 64 each).
#[derive(Debug, Clone, Copy)]
pub struct Round {
    pub sequences: usize,
    pub block: usize,
    pub wide: usize,
}

/// The tables of a round's passes, as `round_begin` writes them.
#[derive(Debug, Clone, Copy)]
pub struct Tables<'a> {
    /// `[sequences][block]` u32: anchor and masks; `u32::MAX` is padding.
    pub draft_tokens: &'a Buffer,
    /// `[2][sequences][block]` `Row`: first the pending features, at the drafter's positions and slots, then the block.
    pub draft_rows: &'a Buffer,
    /// `[sequences][block]` u32: for each pending feature its row of the last verification pass; `u32::MAX` is padding.
    pub features: &'a Buffer,
    /// `[sequences]` `Span`: what the block's rows see of the drafter's pages; no rows where nothing is drafted.
    pub draft_spans: &'a Buffer,
    /// `[sequences][wide]` `Row`
    pub verify_rows: &'a Buffer,
    /// `[sequences]` `Span`
    pub verify_spans: &'a Buffer,
    /// `[3]` u32: the round's number, to be 0 before the first; sequences that take part; rows per sequence of the last
    /// verification, which [`Round::finish`] writes.
    pub round_header: &'a Buffer,
}

/// Records of the last few rounds, in memory that the host reads without waiting.
pub struct Ring {
    pub memory: Pinned,
    sequences: usize,
    wide: usize,
    places: usize,
}

impl Round {
    /// Bytes that [`Round::begin`] must move.
    pub fn begin_bytes(&self) -> u64 {
        (self.sequences * (48 + self.block * 44 + self.wide * 16)) as u64
    }

    /// Bytes that [`Round::tokens`] must move.
    pub fn tokens_bytes(&self) -> u64 {
        (self.sequences * (12 + self.wide * 8)) as u64
    }

    /// Bytes that [`Round::finish`] must move where all drafts stand.
    pub fn finish_bytes(&self) -> u64 {
        (self.sequences * (180 + self.wide * 12)) as u64
    }

    /// Makes the tables. `sequences` `[sequences]` [`Sequence`]; `path` `[sequences][..]` as the last verdict left it, with
    /// as many columns as `tables.round_header` says; without `drafts` every sequence takes a AR step; `mask`: the drafter's
    /// mask token.
    ///
    /// # Errors
    /// [`Error::Internal`] where a buffer is too small or a size outside the limits above; else what the device says.
    pub fn begin(
        &self,
        device: &dyn Device,
        tables: Tables<'_>,
        sequences: &Buffer,
        path: &Buffer,
        drafts: bool,
        mask: u32,
    ) -> Result<()> {
        const NAME: &str = "round_begin";
        let Round { sequences: count, block, wide } = *self;
        check_shape(NAME, count, block)?;
        check_shape(NAME, count, wide)?;
        at_least(NAME, "draft_tokens", tables.draft_tokens, count * block * 4)?;
        aligned(NAME, "draft_rows", tables.draft_rows, 2 * count * block * 16)?;
        at_least(NAME, "features", tables.features, count * block * 4)?;
        aligned(NAME, "draft_spans", tables.draft_spans, count * 8)?;
        aligned(NAME, "verify_rows", tables.verify_rows, count * wide * 16)?;
        aligned(NAME, "verify_spans", tables.verify_spans, count * 8)?;
        at_least(NAME, "round_header", tables.round_header, 12)?;
        aligned(NAME, "sequences", sequences, count * Sequence::BYTES)?;
        at_least(NAME, "path", path, count * wide * 4)?;
        let columns = (path.bytes() / (count * 4)).min(64);
        let args = [
            tables.draft_tokens.into(),
            tables.draft_rows.into(),
            tables.features.into(),
            tables.draft_spans.into(),
            tables.verify_rows.into(),
            tables.verify_spans.into(),
            tables.round_header.into(),
            sequences.into(),
            path.into(),
            (block as u32).into(),
            (wide as u32).into(),
            (columns as u32).into(),
            u32::from(drafts).into(),
            mask.into(),
        ];
        device.launch(&BEGIN, [count as u32, 1, 1], 0, &args)
    }

    /// `tokens` `[sequences][wide]` u32 of the verification pass: anchor, drafts, `u32::MAX` as padding. `drafts`
    /// `[sequences][block]` u32: what the drafter chose at each row of the block; row 0's is not used. `spans`
    /// `[sequences]` `Span`: of the verification.
    ///
    /// # Errors
    /// As [`Round::begin`].
    pub fn tokens(
        &self,
        device: &dyn Device,
        tokens: &Buffer,
        drafts: &Buffer,
        sequences: &Buffer,
        spans: &Buffer,
    ) -> Result<()> {
        const NAME: &str = "round_tokens";
        let Round { sequences: count, block, wide } = *self;
        check_shape(NAME, count, block)?;
        check_shape(NAME, count, wide)?;
        at_least(NAME, "tokens", tokens, count * wide * 4)?;
        at_least(NAME, "drafts", drafts, count * block * 4)?;
        aligned(NAME, "sequences", sequences, count * Sequence::BYTES)?;
        aligned(NAME, "spans", spans, count * 8)?;
        let mut args = vec![tokens.into(), drafts.into(), sequences.into(), spans.into()];
        args.extend([block, wide].map(|n| Arg::U32(n as u32)));
        device.launch(&TOKENS, [count as u32, 1, 1], 0, &args)
    }

    /// Brings `sequences` up to date with the verdict on `tokens` `[sequences][wide]`, and writes the round's records.
    /// `round_header` as [`Round::begin`] left it. `spans` `[sequences]` `Span`: how many rows of each were verified.
    ///
    /// # Errors
    /// As [`Round::begin`].
    #[allow(clippy::too_many_arguments)] // what a kernel takes
    pub fn finish(
        &self,
        device: &dyn Device,
        sequences: &Buffer,
        ring: &Ring,
        round_header: &Buffer,
        verdict: Verdict<'_>,
        tokens: &Buffer,
        spans: &Buffer,
    ) -> Result<()> {
        const NAME: &str = "round_finish";
        let Round { sequences: count, wide, .. } = *self;
        check_shape(NAME, count, wide)?;
        if ring.sequences < count || ring.wide < wide {
            return Err(Error::Internal(format!(
                "kernel {NAME}: a ring for {} sequences of {} rows, needed is {count} of {wide}",
                ring.sequences, ring.wide
            )));
        }
        aligned(NAME, "sequences", sequences, count * Sequence::BYTES)?;
        at_least(NAME, "round_header", round_header, 12)?;
        verdict.check(NAME, count, wide)?;
        at_least(NAME, "tokens", tokens, count * wide * 4)?;
        aligned(NAME, "spans", spans, count * 8)?;
        let args = [
            sequences.into(),
            (&ring.memory.buffer).into(),
            round_header.into(),
            verdict.accepted.into(),
            verdict.next.into(),
            verdict.path.into(),
            tokens.into(),
            spans.into(),
            (wide as u32).into(),
            (ring.places as u32).into(),
            (ring.sequences as u32).into(),
            (record_words(ring.wide) as u32).into(),
        ];
        device.launch(&FINISH, [count as u32, 1, 1], 0, &args)
    }
}

impl Ring {
    /// A ring for the records of `places` rounds of up to `round.wide` rows, empty.
    ///
    /// # Errors
    /// [`Error::Internal`] for sizes outside the limits of [`Round`]; else what the device says.
    pub fn new(device: &dyn Device, round: Round, places: usize) -> Result<Ring> {
        let Round { sequences, wide, .. } = round;
        check_shape("round_finish", sequences, wide)?;
        if !(1..=1 << 16).contains(&places) {
            return Err(Error::Internal(format!("a ring of {places} rounds, possible are 1 to 65536")));
        }
        let memory = device.pinned(places * sequences * record_words(wide) * 4, "the ring of results")?;
        Ok(Ring { memory, sequences, wide, places })
    }

    /// What round number `round` (from 1) did for `sequence`, `None` while it is on its way.
    ///
    /// A record is whole where no later round that takes its place is under way: a ring needs a place more than
    /// rounds are enqueued before the host has read them.
    ///
    /// # Errors
    /// [`Error::Internal`] where a later round has taken the place, or the record makes no sense.
    pub fn read(&self, round: u32, sequence: usize) -> Result<Option<Record>> {
        if sequence >= self.sequences {
            return Err(Error::Internal(format!("the record of sequence {sequence} of {}", self.sequences)));
        }
        let place = round as usize % self.places;
        let at = (place * self.sequences + sequence) * record_words(self.wide) * 4;
        let word = |i: usize| self.memory.read_u32(at + i * 4);
        let overtaken = |found: u32| {
            Error::Internal(format!("round {round} was to be read when round {found} had taken its place"))
        };
        match word(0)? {
            found if found == round => {}
            0 => return Ok(None),
            found if (found.wrapping_sub(round) as i32) < 0 => return Ok(None),
            found => return Err(overtaken(found)),
        }
        let (kept, judged) = (word(1)?, word(2)?);
        if kept as usize > self.wide {
            return Err(Error::Internal(format!(
                "round {round} says it emitted {kept} of {} tokens",
                self.wide
            )));
        }
        let tokens = (0..kept as usize).map(|i| word(8 + i)).collect::<Result<_>>()?;
        let (finish, drafted) = (Finish::from_word(word(3)?)?, word(4)?);
        let stood = u64::from(word(5)?) | u64::from(word(6)?) << 32;
        match word(0)? {
            found if found == round => Ok(Some(Record { tokens, judged, finish, drafted, stood })),
            found => Err(overtaken(found)),
        }
    }
}

/// Words of a record, its tokens included; a multiple of 4.
fn record_words(wide: usize) -> usize {
    (8 + wide).next_multiple_of(4)
}

/// The sizes that all of these kernels take.
pub(super) fn check_shape(kernel: &str, sequences: usize, block: usize) -> Result<()> {
    if (1..=1024).contains(&sequences) && (1..=64).contains(&block) {
        return Ok(());
    }
    Err(Error::Internal(format!(
        "kernel {kernel}: {sequences} sequences in blocks of {block} rows; possible are 1 to 1024 in blocks of 1 to 64"
    )))
}
